from experiments.objectives.run import cli

cli()
