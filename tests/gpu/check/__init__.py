"""`make gpu-check`: what a machine with a GPU should show, in slices of less than nine minutes, and its results.

python -m tests.gpu.check --list                          what there is
python -m tests.gpu.check --slice 1-3                     run some of it; rows, logs and a summary into $OUT
python -m tests.gpu.check.import_results FOLDER           put the rows into docs/results/gpu.csv and the tables of docs
"""
