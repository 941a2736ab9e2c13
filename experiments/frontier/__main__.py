from experiments.frontier.run import cli

cli()
