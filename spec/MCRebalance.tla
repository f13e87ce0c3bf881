---------------------------- MODULE MCRebalance ----------------------------
(* What must hold, what must be reachable, and the history that saying so takes. *)
EXTENDS Rebalance

VARIABLES
    used,      \* the map of each forward pass that some rank has still to execute
    commits,   \* every chunk committed by some rank: where, when and of which plan
    aborts,    \* every epoch aborted by some rank, and in which round
    schedule,  \* every chunk committed, in order: the map, and the first pass that uses it
    seen       \* the map of the last pass that each device has executed, with the rows that it found

history == <<used, commits, aborts, schedule, seen>>

HistoryInit ==
    /\ used = {} /\ commits = {} /\ aborts = {} /\ schedule = <<>>
    /\ seen = [r \in Ranks |-> InitialPlacement]

NewlyUsed ==
    {[pass |-> device'[r].passes, map |-> device'[r].map] :
        r \in {rank \in Ranks : device'[rank].passes > device[rank].passes}}
NewCommits ==
    {[epoch |-> core[r].epoch, chunk |-> core[r].chunk, step |-> core[r].step, plan |-> core[r].plan,
      round |-> journal[r].read, pass |-> pass[r]] :
        r \in {rank \in Ranks : enqueued'[rank] > enqueued[rank]}}
NewAborts ==
    {[epoch |-> core[r].epoch, round |-> core[r].round] :
        r \in {rank \in Ranks : core'[rank].outcome # core[rank].outcome /\ core'[rank].outcome.kind = "ABORTED"}}

StillToCompare(use) == \E r \in Ranks : up'[r] = "up" /\ device'[r].passes < use.pass

(* Whoever reads a COMMIT first decides for all from which pass on the map holds. *)
FirstCommits ==
    {r \in Ranks : enqueued'[r] > enqueued[r] /\
        ~\E commit \in commits : commit.epoch = core[r].epoch /\ commit.chunk = core[r].chunk}
NewSchedule ==
    IF FirstCommits = {} \/ ~Setup.refines THEN schedule
    ELSE LET r == CHOOSE rank \in FirstCommits : TRUE
         IN Append(schedule, [from |-> pass[r] + 1, map |-> core'[r].live])
NewlySeen(r) ==
    [slot \in Slots |-> IF slot \in Own(r) THEN device'[r].rows[slot] ELSE device'[r].map[slot]]

HistoryNext ==
    /\ schedule' = NewSchedule
    /\ seen' = [r \in Ranks |-> IF Setup.refines /\ device'[r].passes > device[r].passes THEN NewlySeen(r)
                           ELSE seen[r]]
    /\ used' = {use \in used \cup NewlyUsed : StillToCompare(use)}
    /\ commits' = commits \cup NewCommits
    /\ aborts' = aborts \cup NewAborts

(* A pass is compared when it is executed: the record of it goes once all have executed it. *)
TornNow == \E use \in used : \E new \in NewlyUsed : use.pass = new.pass /\ use.map # new.map

MCInit == Init /\ HistoryInit
MCNext == Next /\ HistoryNext
MCSpec == MCInit /\ [][MCNext]_<<vars, history>>

Bounded == \A r \in Ranks : core[r].step <= Setup.max_steps /\ core[r].epoch <= Setup.max_epochs

(* -- safety -------------------------------------------------------------------------------------------------- *)

NoTornForward == [][~TornNow]_<<vars, history>>

(* On the device; and what a host believes is what its device holds once it has caught up. *)
LiveEqualsMap ==
    \A r \in Ranks :
        /\ \A slot \in Own(r) : device[r].rows[slot] = device[r].map[slot]
        /\ queue[r] = <<>> => core[r].live = device[r].map

EveryExpertReachable == \A r \in Ranks : \A expert \in Slots : \E slot \in Slots : device[r].map[slot] = expert

SameStepCommit ==
    \A one, two \in commits :
        one.epoch = two.epoch /\ one.chunk = two.chunk => one.step = two.step /\ one.plan = two.plan

SamePlan == SamePlanIn(core)

NoTransferWithoutConsensus == NoTransferWithoutConsensusIn(core, {r \in Ranks : IsUp(r)})

NoOverwriteBeforeConsumed ==
    \A r \in Ranks :
        /\ \A i \in 1 .. Len(queue[r]) : queue[r][i].kind = "commit" =>
              LET buffer == buffers[r][queue[r][i].buffer]
              IN buffer.epoch = queue[r][i].epoch /\ buffer.chunk = queue[r][i].chunk
        /\ core[r].state = "TRANSFERRING" => \A c \in core[r].chunk .. core[r].staged - 1 :
              LET buffer == buffers[r][c % NumBuffers]
              IN buffer.epoch = core[r].epoch /\ buffer.chunk = c

NoStaleReceive ==
    \A r, other \in Ranks : \A i \in 1 .. Len(jobs[other]) :
        Active(core[r]) => jobs[other][i].epoch >= core[r].epoch

CommitCannotFail == \A r \in Ranks : IsUp(r) /\ window[r] # "resolved" => CommitCannotFailIn(core[r])

NoCommitAfterAbort ==
    \A commit \in commits :
        /\ \A abort \in aborts : commit.epoch = abort.epoch => commit.round < abort.round
        /\ \A r \in Ranks : \A i \in DOMAIN cast[r] : cast[r][i].round = commit.round =>
              cast[r][i].abort = 0 /\ cast[r][i].stop = 0

StoppedHarmless ==
    [][\A r \in Ranks : core[r].state = "STOPPED" =>
          core'[r].state = "STOPPED" /\ core'[r].live = core[r].live /\ enqueued'[r] = enqueued[r]]_<<vars, history>>

OutcomeRecorded == \A r \in Ranks : OutcomeRecordedIn(core[r])
EpochBounded == \A r \in Ranks : EpochBoundedIn(core[r])

(* Who stops has voted in every round that the others have posted by then, so nobody waits for it. *)
NoSilentStop ==
    \A r, other \in Ranks :
        HasPosted(core[r]) /\ core[other].state = "STOPPED" /\ up[other] # "crashed"
            => HasVoted(other, core[r].posted.round)

FrozenIsQuiet == \A r, other \in Ranks : core[r].frozen /\ ~Active(core[other]) => jobs[r] = <<>>

(* -- what follows from what -------------------------------------------------------------------------------------- *)

(* A rank that is in an epoch has no outcome of it yet, so where both of two ranks serve, SamePlan says less; and the
   plan of a rank that does not serve any more is the one that it had when it did. *)
SamePlanIsImplied == (\A r \in Ranks : IsUp(r)) /\ NoTransferWithoutConsensus => SamePlan

(* -- liveness ------------------------------------------------------------------------------------------------ *)

(* A rank goes on decoding, votes that are cast are delivered, and whoever waits in vain gives up. A worker need not do
   anything, ever. *)
StepOf(r) ==
    \/ Forward(r) \/ PostVote(r) \/ ReadRound(r) \/ CommitChunk(r)
    \/ GiveUp(r, "TIMEOUT") \/ GiveUpReading(r) \/ ResolveRound(r, "TIMEOUT") \/ FailStop(r)
(* Time ends below, so a rank makes finitely many steps, and weak fairness of them says no more than that again and
   again there is none to make. In this form TLC looks at states only, which is faster. *)
LiveSpec == MCSpec /\ \A r \in Ranks : []<>~ENABLED StepOf(r) /\ []<>~ENABLED Publish(r)

(* So that there are finitely many states, time ends, but not before an epoch must have ended (EpochBounded), and no
   more epochs start than that. No constraint does that, which would hide what comes after it from a liveness property. *)
MayPassInTime(r) ==
    /\ core[r].step < Setup.max_steps
    /\ IsUp(r)
    /\ IsLockstep => \A other \in Ranks : pass[other] >= pass[r]
    /\ MaxAhead > 0 => PassesBehind(r) < MaxAhead
MayStartInTime(tally) ==
    /\ AllDrained(tally) /\ Largest({vote.step : vote \in tally}) >= Largest({vote.earliest : vote \in tally})
    /\ \A vote \in tally : vote.epoch < Setup.max_epochs

Engaged(r) == IsUp(r) /\ Active(core[r])
(* Nobody stays in an epoch for ever: with Engaged(r) ~> ~Engaged(r), which says the same, TLC takes longer. *)
RecoverAfterAbort == \A r \in Ranks : []<>~Engaged(r)

(* -- refinement ------------------------------------------------------------------------------------------------ *)

AtomicPhase ==
    IF \A r \in Ranks : core[r].state = "STOPPED" THEN "stopped"
    ELSE IF \E r \in Ranks : core[r].state = "TRANSFERRING" THEN "moving" ELSE "serving"

Atomic == INSTANCE AtomicRebalance
    WITH made <- [r \in Ranks |-> device[r].passes], used <- seen, schedule <- schedule, phase <- AtomicPhase,
         InitialMap <- InitialPlacement, MaxPasses <- 0, MaxCommits <- 0
(* Atomic!Spec, but for its Init, which holds by definition of HistoryInit; written so that TLC can name it. *)
RefinesAtomic == [][Atomic!Next]_<<[r \in Ranks |-> device[r].passes], seen, schedule, AtomicPhase>>

(* -- reachability: each of these, negated, must fail --------------------------------------------------------------- *)

ForwardAfterLastCommit ==
    \E r \in Ranks : \E commit \in commits :
        /\ commit.chunk = NumChunks - 1
        /\ core[r].outcome.kind = "COMMITTED"
        /\ device[r].passes > commit.pass
CommitAfterAbort == \E commit \in commits : \E abort \in aborts : commit.epoch = abort.epoch + 1

(* An abort, and a forward pass in IDLE after it. *)
NeverRecovers == \A r \in Ranks : ~(core[r].state = "IDLE" /\ core[r].outcome.kind = "ABORTED" /\ pass[r] > core[r].entered)
NeverForwardAfterLastCommit == ~ForwardAfterLastCommit
NeverServesAfterLastEpoch ==
    ~\E r \in Ranks : \E commit \in commits :
        commit.epoch = Setup.max_epochs /\ core[r].outcome.kind = "COMMITTED" /\ device[r].passes > commit.pass
NeverCommitAfterAbort == ~CommitAfterAbort
NeverBoth == ~(ForwardAfterLastCommit /\ CommitAfterAbort)
NeverLateWait == \A r \in Ranks : ~(IsUp(r) /\ ReadIsDue(core[r]) /\ ~AllHaveVoted(core[r].posted.round))
Ended(kind, reason) ==
    \E r \in Ranks : core[r].outcome.kind = kind /\ core[r].outcome.reason = reason /\ device[r].passes > core[r].entered
Halted(reason) == \E r \in Ranks : IsUp(r) /\ core[r].state = "STOPPED" /\ core[r].stop = Stop[reason]

NeverSkipped == ~Ended("SKIPPED", "none")
NeverPlanMismatch == ~Ended("ABORTED", "PLAN_MISMATCH")
NeverLoadError == ~Ended("ABORTED", "LOAD_ERROR")
NeverPolicyError == ~Ended("ABORTED", "POLICY_ERROR")
NeverTransferError == ~Ended("ABORTED", "TRANSFER_ERROR")
NeverWorkerDied == ~Ended("ABORTED", "WORKER_DIED")
NeverIntegrity == ~Ended("ABORTED", "INTEGRITY")
NeverDeadlineCollecting == ~Ended("ABORTED", "DEADLINE_COLLECTING")
NeverDeadlineComputing == ~Ended("ABORTED", "DEADLINE_COMPUTING")
NeverDeadlineAwaitingConsensus == ~Ended("ABORTED", "DEADLINE_AWAITING_CONSENSUS")
NeverDeadlineTransferring == ~Ended("ABORTED", "DEADLINE_TRANSFERRING")
NeverFrozen == ~Ended("ABORTED", "FROZEN")
NeverRequested == ~Ended("ABORTED", "REQUESTED")
NeverUnresolvedVote == \A r \in Ranks : core[r].outcome.reason # "UNRESOLVED_VOTE"
NeverClosed == ~Halted("CLOSED")
NeverTimeout == ~Halted("TIMEOUT")
NeverTransport == ~Halted("TRANSPORT")
NeverDesync == \A r \in Ranks : core[r].outcome.reason # "DESYNC"
NeverCommitFailed == \A r \in Ranks : core[r].outcome.reason # "COMMIT_FAILED"
NeverFrozenState == \A r \in Ranks : ~core[r].frozen
NeverFailStop == \A r \in Ranks : up[r] # "failed"
(* An abort whose transfers do not end becomes a stop. *)
NeverDrained == ~\E r \in Ranks : core[r].state = "STOPPED" /\ core[r].stop = Stop.TRANSPORT
(* Several chunks are decided and not live, on any rank and on one that has resolved its round; and a promise is out while
   some are. *)
NeverSeveral == \A r \in Ranks : core[r].decided <= 1
NeverResolvedSeveral == \A r \in Ranks : ~(core[r].decided > 1 /\ window[r] = "resolved")
NeverOverlap == \A r \in Ranks : ~(core[r].decided > 0 /\ InWindow(core[r]))
NeverResolvedCommit == \A r \in Ranks : ~(window[r] = "resolved" /\ journal[r].read_commits > 0)

(* -- setups of the checks ------------------------------------------------------------------------------------------ *)

NoFaults == [fault \in {"request", "freeze", "unfreeze", "abort", "stop", "timeout", "commit", "close", "crash", "work",
                       "plan", "worker", "transport", "damage", "skip", "double", "stale"} |-> 0]

Plain ==
    [lag |-> 1, idle_interval |-> 2, backoff |-> 1,
     deadline |-> [COLLECTING |-> 2, COMPUTING |-> 2, AWAITING_CONSENSUS |-> 3, TRANSFERRING |-> 5], drain_deadline |-> 3,
     num_chunks |-> 2, num_ranks |-> 2, is_lockstep |-> TRUE, has_pass_ids |-> FALSE, num_buffers |-> 2, max_ahead |-> 0,
     asking |-> {0}, plans |-> {"a"}, is_dependent |-> FALSE, faults |-> NoFaults, max_steps |-> 10, max_epochs |-> 1, refines |-> FALSE]

One == [Plain EXCEPT !.num_chunks = 1, !.max_steps = 7]
Twice == [Plain EXCEPT !.num_chunks = 1, !.max_steps = 11, !.max_epochs = 2]

OneFree == [One EXCEPT !.is_lockstep = FALSE]
Free == [Plain EXCEPT !.is_lockstep = FALSE]
Lag2 == [Plain EXCEPT !.lag = 2, !.max_steps = 18]
Sync == [Plain EXCEPT !.lag = 0, !.max_steps = 4]
Behind == [Plain EXCEPT !.max_ahead = 1, !.is_dependent = TRUE]
OneBuffer == [Plain EXCEPT !.max_ahead = 1, !.num_buffers = 1]
Failing == [Twice EXCEPT !.faults = [NoFaults EXCEPT !["work"] = 1]]
Mismatch == [Twice EXCEPT !.plans = {"a", "b", "skip"}, !.faults = [NoFaults EXCEPT !["plan"] = 1]]
Damaging == [Twice EXCEPT !.faults = [NoFaults EXCEPT !["damage"] = 1]]
Dying == [Twice EXCEPT !.faults = [NoFaults EXCEPT !["worker"] = 1]]
Late == [One EXCEPT !.faults = [NoFaults EXCEPT !["timeout"] = 2]]
LateFree == [Late EXCEPT !.is_lockstep = FALSE]
Crashing == [One EXCEPT !.faults = [NoFaults EXCEPT !["timeout"] = 1, !["crash"] = 1]]
CrashingFree == [Crashing EXCEPT !.is_lockstep = FALSE]
Breaking == [One EXCEPT !.faults = [NoFaults EXCEPT !["transport"] = 1, !["commit"] = 1]]
LateSeveral == [Plain EXCEPT !.faults = [NoFaults EXCEPT !["timeout"] = 1], !.idle_interval = 1, !.max_steps = 8]
LateSeveralTwice == [LateSeveral EXCEPT !.faults["timeout"] = 2]
BreakingSeveral == [Plain EXCEPT !.faults = [NoFaults EXCEPT !["commit"] = 1], !.idle_interval = 1, !.max_steps = 8]
(* A vote is out while commits of the round before are left. *)
Overlap ==
    [Plain EXCEPT !.lag = 2, !.num_chunks = 3, !.num_buffers = 3, !.idle_interval = 1, !.max_steps = 13,
                  !.faults = [NoFaults EXCEPT !["commit"] = 1]]
ClosingFree == [One EXCEPT !.is_lockstep = FALSE, !.faults = [NoFaults EXCEPT !["close"] = 1, !["timeout"] = 1]]
Freezing == [One EXCEPT !.faults = [NoFaults EXCEPT !["freeze"] = 1, !["unfreeze"] = 1], !.max_steps = 11, !.max_epochs = 2]
Asked == [One EXCEPT !.faults = [NoFaults EXCEPT !["abort"] = 1, !["stop"] = 1]]
Doubling == [One EXCEPT !.has_pass_ids = TRUE, !.faults = [NoFaults EXCEPT !["double"] = 2]]
DoublingUnseen == [Doubling EXCEPT !.has_pass_ids = FALSE]
AbortingOnce == [One EXCEPT !.faults = [NoFaults EXCEPT !["abort"] = 1]]
Aborting == [Twice EXCEPT !.faults = [NoFaults EXCEPT !["abort"] = 1]]
Stopping == [One EXCEPT !.faults = [NoFaults EXCEPT !["stop"] = 1]]
DamagingOnce == [One EXCEPT !.faults = [NoFaults EXCEPT !["damage"] = 1]]
FreezingOnce == [One EXCEPT !.faults = [NoFaults EXCEPT !["freeze"] = 1]]
Restarting == [Twice EXCEPT !.faults = [NoFaults EXCEPT !["work"] = 1], !.idle_interval = 1, !.max_steps = 6]
OneBehind == [One EXCEPT !.max_ahead = 1]
Differing == [One EXCEPT !.plans = {"a", "b"}, !.faults = [NoFaults EXCEPT !["plan"] = 1]]
Stale == [One EXCEPT !.faults = [NoFaults EXCEPT !["stale"] = 1]]
Gainless == [One EXCEPT !.plans = {"a", "skip"}, !.faults = [NoFaults EXCEPT !["plan"] = 2]]
Skipping == [One EXCEPT !.has_pass_ids = TRUE, !.faults = [NoFaults EXCEPT !["skip"] = 1]]
Refined(setup) == [setup EXCEPT !.refines = TRUE]
RefinedOne == Refined(One)
RefinedFree == Refined(OneFree)
RefinedLate == Refined(Late)
RefinedFailing == Refined([Failing EXCEPT !.idle_interval = 1, !.max_steps = 8])
RefinedDamaging == Refined(Damaging)
RefinedBehind == Refined(OneBehind)
RefinedDependent == Refined(Behind)
RefinedMismatch == Refined(Mismatch)
RefinedDoubling == Refined(DoublingUnseen)
(* Larger ones, with no more steps than it takes. *)
ThreeChunks == [Plain EXCEPT !.num_chunks = 3, !.max_steps = 8]
ThreeRanks == [One EXCEPT !.num_ranks = 3, !.idle_interval = 1, !.max_steps = 5]
(* Work that takes longer than deadlines allow. *)
Hanging ==
    [Twice EXCEPT !.deadline = [COLLECTING |-> 0, COMPUTING |-> 0, AWAITING_CONSENSUS |-> 0, TRANSFERRING |-> 1],
                  !.num_buffers = 1, !.idle_interval = 1, !.max_steps = 9]
ThreeEpochs == [Hanging EXCEPT !.max_epochs = 3, !.max_steps = 13]
Recovering == [Hanging EXCEPT !.max_steps = 9, !.max_epochs = 1]
RecoveringFree ==
    [Recovering EXCEPT !.is_lockstep = FALSE, !.faults = [NoFaults EXCEPT !["timeout"] = 2, !["crash"] = 1],
                       !.deadline["TRANSFERRING"] = 0, !.max_steps = 8]
=============================================================================
