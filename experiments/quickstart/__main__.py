from experiments.quickstart.run import cli

cli()
