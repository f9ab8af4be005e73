"""What Snakemake asks of the package: names of files, digests of science and of content, costs."""
