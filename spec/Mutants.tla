------------------------------- MODULE Mutants -------------------------------
(* The protocol with one thing wrong, each of which must be found. A cfg puts an operator of this module in the place
   of one of the protocol (`NothingDue <- PassWithoutResult`), or checks a specification with one more action. *)
EXTENDS MCRebalance

(* A round that is late is not waited for. *)
PassWithoutResult(r) == ~CommitIsDue(core[r]) /\ ~PostIsDue(core[r]) /\ window[r] = "no"

(* The vote carries no digest of the plan. *)
NoDigest(c) == NoPlan

(* BEGIN looks at progress alone. *)
BeginOnProgress(tally) ==
    IF Largest(Progresses(tally)) = SkipVote THEN Decision("SKIP", "none") ELSE Decision("BEGIN", "none")

(* COMMIT looks at progress alone, and comes before ABORT. *)
CommitOnProgress(tally) ==
    IF Smallest(Progresses(tally)) = StagedVote THEN DecideCommit(tally)
    ELSE IF \E vote \in tally : vote.abort > 0
    THEN Decision("ABORT", AbortName(Largest({vote.abort : vote \in tally})))
    ELSE IF Largest(Progresses(tally)) = IdleVote THEN DecideIdle(tally)
    ELSE IF Smallest(Progresses(tally)) \in {SkipVote, ReadyVote} THEN DecidePlan(tally)
    ELSE Nothing

(* An epoch starts while transfers of the one before are under way. *)
StartUndrained(tally) ==
    Largest({vote.step : vote \in tally}) >= Largest({vote.earliest : vote \in tally})

(* A freeze does not wait for transfers. *)
FreezeUndrained(tally) == TRUE

(* A chunk is staged into a buffer that is not free. *)
BeginBeforeBufferIsFree(plan, chunk) ==
    Largest({c \in Chunks : c < chunk /\ Conflict(plan, c, chunk)} \cup {-1})

(* A chunk is staged though one before it, not committed, writes its rows. *)
BeginInConflict(plan, chunk) == Largest({chunk - NumBuffers, -1})

(* Rows are packed though the device has not executed the commit that writes them. *)
IgnoreCommitEvent(r) == TRUE

(* The sources of all chunks are where the experts were before the first one. *)
SourceInFirstPlacement(plan, chunk, slot) ==
    LET source == Partner(plan, chunk, slot)
    IN IF chunk > 0 /\ source \in Touched(plan, 0) THEN Partner(plan, 0, source) ELSE source

(* A rank makes live all that it has staged itself, whatever the others have. *)
CommitOwnStaged(c, chunks) ==
    [c EXCEPT !.decided = c.staged - c.chunk, !.commit_due = c.read_due + StepsPerCommit(c)]

(* A rank that has resolved a round makes all of it live at once, and so leaves at once. *)
CommitAtOnceLeaving(c) == IF c.lag = 0 \/ c.leaving THEN 0 ELSE 1

(* A rank that has resolved a round leaves before all of it is live. *)
LeaveEarly(r) == TRUE

(* A rank in the window gives up and serves on. *)
GiveUpAnywhere(r) == TRUE

(* Giving up reading a decision is not binding. *)
ReadAfterGivingUp(r) == window[r] \in {"no", "resolving"}

(* A transfer that is not complete counts as one. *)
CountIncomplete(r) == TRUE

(* Rows carry no hash. *)
VerifyNothing(rows) == TRUE

(* Nobody votes on a deadline. *)
IgnoreDeadlines(c) == c

(* A rank whose plan is there counts the wait of its epoch from then on, whatever the others are at. *)
PauseFromOwnPlan(c) ==
    LET last == IF c.lag = 0 THEN c.step ELSE c.step - 1
        since == IF c.state = "AWAITING_CONSENSUS" THEN c.entered ELSE c.progressed
    IN CASE ~MayPostNext(c) -> [c EXCEPT !.post_due = Never]
         [] Active(c) -> [c EXCEPT !.post_due = c.step + Pause(c.step - since)]
         [] OTHER -> [c EXCEPT !.post_due = ((last \div IdleInterval) + 1) * IdleInterval]

(* Who waits for a vote of a dead rank waits for ever. *)
WaitForEver(r) == FALSE

(* The placement that a rank believes in is that of its plan, before anything is committed. *)
BelieveThePlan(c, epoch, plan) ==
    IF epoch = c.epoch /\ c.state = "COMPUTING"
    THEN Enter([c EXCEPT !.plan = plan, !.live = Successor(@, plan, 0)], "AWAITING_CONSENSUS") ELSE c

(* An abort leaves no outcome. *)
AbortInSilence(c, reason) ==
    Enter([c EXCEPT !.plan = NoPlan, !.chunk = 0, !.staged = 0, !.abort = 0, !.request = TRUE], "IDLE")

(* An epoch without gain leaves no outcome. *)
SkipInSilence(c) == Enter([c EXCEPT !.plan = NoPlan], "IDLE")

(* The generation of a vote is not compared, all else is. *)
SamePlaceInAnyGeneration(tally) ==
    /\ Equal({<<vote.round, vote.step, vote.pass, vote.epoch>> : vote \in tally})
    /\ \/ Largest(Progresses(tally)) < StagingVote
       \/ Equal({<<vote.chunk, vote.num_chunks, vote.plan>> : vote \in tally})
    /\ Equal({Phase(progress) : progress \in Progresses(tally)})

(* A plan that nobody validates: it copies one expert over another, which is nowhere then. *)
SourceOfCopy(plan, chunk, slot) == Swap(plan, chunk)[2]
CopiedOver(live, plan, chunk) ==
    [slot \in Slots |-> IF slot \in Touched(plan, chunk) THEN live[Swap(plan, chunk)[2]] ELSE live[slot]]

(* -- one more action ------------------------------------------------------------------------------------------ *)

Others == <<pass, up, cast, window, journal, board, worker, wire, buffers, budget>>

(* A rank makes a chunk live as soon as it is staged here. *)
CommitAlone(r) ==
    /\ Takes(r)
    /\ core[r].state = "TRANSFERRING"
    /\ core[r].staged > NextChunk(core[r])
    /\ core' = [core EXCEPT ![r] = commit_chunk([@ EXCEPT !.decided = 1])]
    /\ CarryOutCommit(r)
    /\ UNCHANGED Others

(* A rank begins to stage as soon as its own plan is there. *)
BeginAlone(r) ==
    /\ Takes(r)
    /\ core[r].state = "AWAITING_CONSENSUS"
    /\ ~HasPosted(core[r])
    /\ core' = [core EXCEPT ![r] = Enter(@, "TRANSFERRING")]
    /\ BeginStaging(r, core[r], 0, -1, enqueued[r])
    /\ UNCHANGED <<pass, up, cast, window, journal, board, worker, wire, buffers, enqueued, queue, device,
                   budget>>

(* A rank that has promised takes its promise back. *)
Withdraw(r) ==
    /\ IsUp(r)
    /\ InWindow(core[r])
    /\ core' = [core EXCEPT ![r].staged = core[r].chunk]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device, budget>>

(* A deadline acts on one rank instead of voting. *)
AbortAlone(r) ==
    /\ IsUp(r)
    /\ Active(core[r])
    /\ core[r].step - core[r].entered >= 2
    /\ core' = [core EXCEPT ![r] = [AbortEpoch([@ EXCEPT !.posted = NoVote], "DEADLINE_TRANSFERRING")
                                     EXCEPT !.post_due = core[r].step + 2]]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device, budget>>

(* A rank stops without a last vote. *)
StopInSilence(r) ==
    /\ IsUp(r)
    /\ window[r] = "no"
    /\ Missing(r)
    /\ ~InWindow(core[r])
    /\ core' = [core EXCEPT ![r] = after_last_vote(@, "TIMEOUT")]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device, budget>>

(* A stopped rank makes live what it had staged. *)
CommitStopped(r) ==
    /\ IsUp(r)
    /\ core[r].state = "STOPPED"
    /\ core[r].outcome.kind = "FAILED"
    /\ \E b \in DOMAIN buffers[r] :
          /\ buffers[r][b].epoch = core[r].epoch
          /\ Enqueue(r, [kind |-> "commit", buffer |-> b, epoch |-> core[r].epoch, chunk |-> buffers[r][b].chunk,
                         map |-> Swapped(core[r].live, Usual, buffers[r][b].chunk)])
          /\ core' = [core EXCEPT ![r].live = Swapped(@, Usual, buffers[r][b].chunk)]
    /\ enqueued' = [enqueued EXCEPT ![r] = @ + 1]
    /\ UNCHANGED <<jobs, begun>> /\ UNCHANGED Others

(* A stopped rank calls itself idle again. *)
WakeUp(r) ==
    /\ IsUp(r)
    /\ core[r].state = "STOPPED"
    /\ core' = [core EXCEPT ![r] = Enter(@, "IDLE")]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device, budget>>

(* A freeze is granted at once, though a promise is out: this rank forgets the epoch, and does not read its round. *)
FreezeInWindow(r) ==
    /\ IsUp(r)
    /\ core[r].freeze
    /\ InWindow(core[r])
    /\ LET frozen == AbortEpoch([core[r] EXCEPT !.posted = NoVote, !.read_due = Never, !.frozen = TRUE], "FROZEN")
       IN core' = [core EXCEPT ![r] = ScheduleNext(frozen)]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device, budget>>

(* A rank that wants an abort frees its buffers before all have agreed to it. *)
FreeAlone(r) ==
    /\ Takes(r)
    /\ core[r].state = "TRANSFERRING"
    /\ core[r].staged > NextChunk(core[r])
    /\ core[r].decided = 0 /\ ~InWindow(core[r])
    /\ core' = [core EXCEPT ![r] = SetAbort(@, "TRANSFER_ERROR")]
    /\ buffers' = [buffers EXCEPT ![r] = [b \in DOMAIN @ |-> Empty]]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, begun, enqueued, queue, device, budget>>

(* A forward pass is counted as two steps while a commit is decided. *)
CountTwice(r) ==
    /\ MayPass(r)
    /\ NothingDue(r)
    /\ core[r].decided > 0
    /\ pass' = [pass EXCEPT ![r] = @ + 1]
    /\ core' = [core EXCEPT ![r].step = @ + 2]
    /\ Enqueue(r, [kind |-> "forward"])
    /\ UNCHANGED <<up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, budget>>

(* A device makes a forward pass before a commit that was enqueued before it: they are on two streams. *)
Overtake(r) ==
    /\ up[r] # "crashed"
    /\ Len(queue[r]) > 1
    /\ queue[r][1].kind = "commit" /\ queue[r][2].kind = "forward"
    /\ device' = [device EXCEPT ![r] = Executed(r, @, queue[r][2])]
    /\ queue' = [queue EXCEPT ![r] = <<@[1]>> \o SubSeq(@, 3, Len(@))]
    /\ UNCHANGED <<core, pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, budget>>

With(action(_)) == (Next \/ \E r \in Ranks : action(r)) /\ HistoryNext
CommitAloneSpec == MCInit /\ [][With(CommitAlone)]_<<vars, history>>
BeginAloneSpec == MCInit /\ [][With(BeginAlone)]_<<vars, history>>
WithdrawSpec == MCInit /\ [][With(Withdraw)]_<<vars, history>>
AbortAloneSpec == MCInit /\ [][With(AbortAlone)]_<<vars, history>>
StopInSilenceSpec == MCInit /\ [][With(StopInSilence)]_<<vars, history>>
WakeUpSpec == MCInit /\ [][With(WakeUp)]_<<vars, history>>
FreezeInWindowSpec == MCInit /\ [][With(FreezeInWindow)]_<<vars, history>>
FreeAloneSpec == MCInit /\ [][With(FreeAlone)]_<<vars, history>>
CountTwiceSpec == MCInit /\ [][With(CountTwice)]_<<vars, history>>
OvertakeSpec == MCInit /\ [][With(Overtake)]_<<vars, history>>
CommitStoppedSpec == MCInit /\ [][With(CommitStopped)]_<<vars, history>>
=============================================================================
