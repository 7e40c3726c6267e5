"""The Trainer's side: what happens in a run, from its set-up to its end. Below this room, nothing knows Lightning."""
