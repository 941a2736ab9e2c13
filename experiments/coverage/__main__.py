from experiments.coverage.run import cli

cli()
