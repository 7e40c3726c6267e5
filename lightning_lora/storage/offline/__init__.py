"""Work on files without the model's code: for the console command, and for sums of a model's own adapters."""
