from experiments.ridge.run import cli

cli()
