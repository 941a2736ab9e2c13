from experiments.atlas.run import cli

cli()
