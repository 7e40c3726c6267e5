"""Steps of a Trainer's run. Only this and the callback import Lightning. It may import all other subpackages."""
