#!/bin/bash
# Runs a command after the site's set-up, on the node and outside of any container: slurm/set_up.sh python train_hvd.py
# No strict modes here, because modules and conda are not written for them.
# What the file prints must not mix with the output of the command. The file must not see the command's arguments:
# `source activate` would take them for its own.
given=("$@")
set --
# shellcheck disable=SC1090
source "$CNNOPT_SETUP" >&2 || { echo "CNNOPT_SETUP=$CNNOPT_SETUP: its last command failed with status $?" >&2; exit 2; }
# Put .venv before any Python that the file has loaded.
PATH=$PWD/.venv/bin:$PATH
unset PYTHONSAFEPATH
exec "${given[@]}"
