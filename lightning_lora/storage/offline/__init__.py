"""Work on files without the model, for the console command."""
