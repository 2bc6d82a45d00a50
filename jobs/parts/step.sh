# --- one step of ranks, its signals, and what is done when it has ended ---
# srun starts the ranks itself, no launcher between: under Slurm's process tracking only the children of its own daemon
# get signals.  A launcher would get them in the ranks' place: torchrun and deepspeed die of USR1, the deepspeed command
# of TERM too, and their ranks are killed before they can save.
#
# What happens next is decided by the outcome file, which the trainer writes as its last act, never by exit codes: srun
# gives the highest one of all ranks, and the same event was seen as 75, 143 and 1.
step=
state() { squeue --noheader --jobs="$JOB" --format='%T %r'; }
in_time_limit() { [ "$(state)" = "COMPLETING TimeLimit" ]; }
forward() { # every rank gets the signal; before the step exists there is nobody to tell
  if scancel --signal="$1" "$JOB.0" 2>/dev/null; then
    say "$1 received, handed on to the ranks"
  else
    say "$1 received, and no ranks to hand it on to"
  fi
}
on_term() {
  forward TERM
  # At the time limit all is killed after Slurm's KillWait, this script too: ask for the next start before that.
  if in_time_limit; then requeue "the time limit"; fi
}
trap 'forward USR1' USR1 # the warning that --signal=B:USR1 asks for
trap on_term TERM        # the time limit, scontrol requeue, a lost node, preemption, scancel

requeued=
requeue() { # once; Slurm sends TERM to this script while it takes the job back, so this is noted before
  local try
  [ -z "$requeued" ] || return 0
  requeued=yes
  for try in 1 2 3; do # Slurm's controller may be busy or restarting
    case $(state) in
      '') ;; # no answer: it may have been cancelled, which scontrol would undo
      COMPLETING\ TimeLimit | CONFIGURING* | [!C]*)
        if scontrol requeue "$JOB"; then
          say "requeued: $1"
          return 0
        fi
        ;;
      *) break ;; # cancelled since
    esac
    sleep $((try * 5))
  done
  requeued=
  say "could not be requeued: $1"
}
run_step() { # the arguments: the command of a rank
  srun --kill-on-bad-exit=1 "${srun_options[@]}" "${on_node[@]}" "$@" &
  step=$!
  while :; do # `wait` returns at each trapped signal; a foreground srun would keep the traps waiting till the end
    wait "$step"
    kill -0 "$step" 2>/dev/null || break
  done
}
outcome() { # first word of the file $1, or nothing
  local word=
  [ -e "$1" ] && read -r word _ <"$1"
  echo "$word"
}
trainer_starts() { find "$RUN/incarnations" -name '*.json' 2>/dev/null | wc -l; }
false_starts() { # how many starts in a row ended without a word before the trainer had taken the run
  local count=0 then=
  [ -e "$RUN/jobs/false-starts" ] && read -r count then <"$RUN/jobs/false-starts"
  [ "$then" = "$(trainer_starts)" ] && [[ $count =~ ^[0-9]+$ ]] && echo "$count" || echo 0
}
give_up() {
  say "$(false_starts) starts in a row ended before the trainer had begun: giving up; the log above has the reason"
  exit 1
}
start_again() { # $1: why
  local ended=
  [ -z "$requeued" ] || exit 75 # asked for already, at the time limit
  trap ended=yes TERM
  trap '' USR1
  requeue "$1"
  [ -n "$ended$requeued" ] || exit 75
  # Slurm ends this script when it takes the job back; leaving first would finish the job instead.
  [ -n "$ended" ] || { sleep 120 & wait $!; }
  exit 75
}
train_and_decide() { # the arguments: the command of a rank
  if [ "$(outcome "$RUN/outcome")" = finished ]; then
    say "$RUN is finished already: nothing to do"
    exit 0
  fi
  [ "$SLURM_RESTART_COUNT" -gt 0 ] || rm -f -- "$RUN/jobs/false-starts"
  [ "$(false_starts)" -lt 3 ] || give_up
  mkdir -p -- "$RUN/jobs" || exit 1
  # One file for each start of each job: left-overs of an earlier start, or another job in this run, cannot speak for it.
  export MIRAI_DS_OUTCOME=$RUN/jobs/outcome-$JOB-$SLURM_RESTART_COUNT
  say "${SLURM_JOB_NUM_NODES:-1} nodes ($SLURM_JOB_NODELIST), ${SLURM_NTASKS:-?} ranks, $RUN"
  local word starts
  starts=$(trainer_starts)
  run_step "$@"
  word=$(outcome "$MIRAI_DS_OUTCOME")
  say "the ranks have ended: $([ -n "$word" ] && head -n 1 -- "$MIRAI_DS_OUTCOME" || echo 'without a word')"
  case $word in finished | stopped) exit 0 ;; failed) exit 1 ;; esac
  if [ -z "$requeued" ] && [[ "$(state)" == COMPLETING* ]] && ! in_time_limit; then
    # scontrol requeue, preemption, a lost node: Slurm starts the job again by itself.  scancel: it must not come back,
    # and `scontrol requeue` would bring even a cancelled job back.
    say "Slurm is ending this job: what becomes of it is left to Slurm"
    exit 75
  fi
  if [ -z "$word" ]; then # killed, out of memory, a lost node: the trainer counts such starts.  Or it never began:
    echo "$(($(false_starts) + 1)) $starts" >"$RUN/jobs/false-starts"
    [ "$(false_starts)" -lt 3 ] || give_up
  fi
  start_again "the run is not finished"
}
