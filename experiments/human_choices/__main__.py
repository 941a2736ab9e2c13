from experiments.human_choices.run import cli

cli()
