#!/bin/bash
# {{title}}
# Made by `mirai-ds submit` from jobs/{{template}}.sbatch and the cluster file {{cluster}}.  To send it again:
#   {{sbatch}}
#SBATCH --job-name={{job_name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node={{ranks_per_node}}
#SBATCH --cpus-per-task={{cpus_per_rank}}
#SBATCH --time={{time}}
{{site_options}}
