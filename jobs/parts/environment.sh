# The one job that this script is.  In an array SLURM_JOB_ID of the task that Slurm starts last is the id of all of them.
JOB={{job_id}}
# Slurm does not set this for a first start: a job sent from within a restarted one would go on counting from there.
restarts=$(scontrol show job "$JOB" 2>/dev/null | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p' | head -n 1)
export SLURM_RESTART_COUNT=${restarts:-${SLURM_RESTART_COUNT:-0}}
say() { echo "mirai-ds job $JOB, start $((SLURM_RESTART_COUNT + 1)): $*"; }
cd -- {{submit_dir}} || exit 1

# --- what the cluster file adds: modules, virtual environments, variables ---
{{setup}}

# The same programs first in PATH on every node: with another ninja than last time, compiled operations are built again.
{{path}}

# Where the ranks meet: the first node of the job, a port that two jobs on one node hardly share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Since Slurm 22.05 srun does not take --cpus-per-task from the job: without this every rank would get one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# One thread a core of the rank; the default is one a core of the node, for each of its ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
# Python's lines reach the log when they are printed, not when a buffer is full (or lost with a killed rank).
export PYTHONUNBUFFERED=1

{{device_environment}}

# Options of every srun from the cluster file, and what each rank's own shell does before it becomes the rank: the setup
# lines once more, since those above were heard on the first node only.
srun_options=({{srun_options}})
on_node=({{on_node}})
