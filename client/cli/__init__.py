"""The commands of a site, one file for each noun."""
