from experiments.online.run import cli

cli()
