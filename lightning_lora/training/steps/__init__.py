"""What acts while a run's steps are computed: gradients, dropout, and looks at the first steps."""
