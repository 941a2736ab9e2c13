from experiments.rules.run import cli

cli()
