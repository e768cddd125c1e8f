"""Ready programs that the command line and the notebooks run: users of the public package, like anybody else."""
