"""Random numbers: new adapters draw apart from the run, and a resumed run goes on with those of its checkpoint."""
