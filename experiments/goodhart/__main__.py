from experiments.goodhart.run import cli

cli()
