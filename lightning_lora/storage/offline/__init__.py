"""Work on files without the model: the console command's side of storage."""
