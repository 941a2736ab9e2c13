from experiments.chat.run import cli

cli()
