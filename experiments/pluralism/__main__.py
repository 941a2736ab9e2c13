from experiments.pluralism.run import cli

cli()
