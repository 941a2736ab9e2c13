from experiments.rates.run import cli

cli()
