"""What Snakemake asks of the package: file names, digests of science and of content, costs."""
