"""`python -m iha_lab.cli`, which launchers of several processes take."""

from iha_lab.cli import main

main()
