# --- one step of ranks, its signals, and what is done when it has ended ---
# srun starts the ranks itself, no launcher between: under Slurm's process tracking only the children of its own daemon
# get signals.  A launcher would get them in the ranks' place: torchrun and deepspeed die of USR1, the deepspeed command
# of TERM too, and their ranks are killed before they can save.
#
# What happens next is decided by RUN/outcome, which the trainer writes as its last act, never by exit codes: srun gives
# the highest one of all ranks, and the same event was seen as 75, 143 and 1.
step=
in_time_limit() { [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r')" = "COMPLETING TimeLimit" ]; }
being_ended() { [[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" == COMPLETING ]]; }
forward() { # every rank gets the signal; before the step exists there is nobody to tell
  say "$1 received, handed on to the ranks"
  scancel --signal="$1" "$SLURM_JOB_ID.0" 2>/dev/null || :
}
on_term() {
  forward TERM
  # At the time limit all is killed after Slurm's KillWait, this script too: ask for the next start before that.
  if in_time_limit; then requeue "the time limit"; fi
}
trap 'forward USR1' USR1 # the warning that --signal=B:USR1 asks for
trap on_term TERM        # the time limit, scontrol requeue, a lost node, preemption, scancel

requeued=
requeue() {
  local try
  for try in 1 2 3; do # Slurm's controller may be busy or restarting
    [ -z "$requeued" ] || return 0
    if scontrol requeue "$SLURM_JOB_ID"; then requeued=yes && say "requeued: $1"; else sleep $((try * 5)); fi
  done
  [ -n "$requeued" ] || say "could not be requeued: $1"
}
run_step() { # the arguments: the command of a rank
  srun --kill-on-bad-exit=1 "$@" &
  step=$!
  while :; do # `wait` returns at each trapped signal; a foreground srun would keep the traps waiting till the end
    wait "$step"
    kill -0 "$step" 2>/dev/null || break
  done
}
outcome() { # first word of RUN/outcome, or nothing
  local word=
  [ -e "$RUN/outcome" ] && read -r word _ <"$RUN/outcome"
  echo "$word"
}
newest() { cat -- "$RUN/checkpoints/latest" 2>/dev/null || echo none; }
silent_ends() { # how many starts in a row have ended without a word or a new checkpoint
  local count=0 then=
  [ -e "$RUN/jobs/silent-ends" ] && read -r count then <"$RUN/jobs/silent-ends"
  [ "$then" = "$(newest)" ] && [[ $count =~ ^[0-9]+$ ]] && echo "$count" || echo 0
}
give_up() {
  say "$(silent_ends) starts in a row ended without a word or a new checkpoint: giving up; the log above has the reason"
  exit 1
}
start_again() { # $1: why
  local ended=
  trap ended=yes TERM
  trap '' USR1
  requeue "$1"
  [ -n "$ended$requeued" ] || exit 75
  # Slurm ends this script when it takes the job back; leaving first would finish the job instead.
  [ -n "$ended" ] || { sleep 120 & wait $!; }
  exit 75
}
train_and_decide() { # the arguments: the command of a rank
  if [ "$(outcome)" = finished ]; then
    say "$RUN is finished already: nothing to do"
    exit 0
  fi
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f -- "$RUN/jobs/silent-ends"
  [ "$(silent_ends)" -lt 3 ] || give_up
  mkdir -p -- "$RUN/jobs" && rm -f -- "$RUN/outcome" || exit 1
  say "${SLURM_JOB_NUM_NODES:-1} nodes ($SLURM_JOB_NODELIST), ${SLURM_NTASKS:-?} ranks, $RUN"
  run_step "$@"
  local word
  word=$(outcome)
  say "the ranks have ended: $([ -e "$RUN/outcome" ] && head -n 1 -- "$RUN/outcome" || echo 'without a word')"
  [ -z "$word" ] || rm -f -- "$RUN/jobs/silent-ends"
  case $word in finished | stopped) exit 0 ;; failed) exit 1 ;; esac
  if [ -z "$requeued" ] && being_ended && ! in_time_limit; then
    # scontrol requeue, preemption, a lost node: Slurm starts the job again by itself.  scancel: it must not come back,
    # and `scontrol requeue` would bring even a cancelled job back.
    say "Slurm is ending this job: what becomes of it is left to Slurm"
    exit 75
  fi
  if [ -z "$word" ]; then # killed, out of memory, a lost node, or they could not even begin
    echo "$(($(silent_ends) + 1)) $(newest)" >"$RUN/jobs/silent-ends"
    [ "$(silent_ends)" -lt 3 ] || give_up
  fi
  start_again "the run is not finished"
}
