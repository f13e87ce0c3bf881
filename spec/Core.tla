-------------------------------- MODULE Core --------------------------------
(* What one rank knows of the protocol, as a record, and what changes it: core/rank.py. Operators in
   snake_case are its methods, of the same names. Nothing here knows of messages, workers, devices or time. *)
EXTENDS Votes, Sequences

CONSTANTS
    Setup,               \* a record of all numbers, so that the checks of one setup name it and do not repeat it
    Successor(_, _, _)   \* the placement after chunk c of plan p is committed to a placement

Lag == Setup.lag                         \* steps between posting and reading a round; 0 is the synchronous mode
IdleInterval == Setup.idle_interval      \* steps between rounds while idle
Backoff == Setup.backoff                 \* steps before the next try after an abort
Deadline == Setup.deadline               \* function from the active states to steps
DrainDeadline == Setup.drain_deadline    \* steps until an abort that does not drain becomes a stop
NumChunks == Setup.num_chunks            \* chunks of a plan
NumBuffers == Setup.num_buffers          \* chunks that may be staged at a time, so the most that one round commits

WaitedPerPause == 4   \* steps of waiting for each step between two rounds of an epoch

NoVote == [round |-> 0]
NoPlan == "none"
SkipPlan == "skip"
Never == 1000000

(* What may differ from plan to plan where plans are real ones (Traces.tla). *)
ChunksOf(plan) == NumChunks
IsSkip(plan) == plan = SkipPlan
DeadlineIn(state, plan) == Deadline[state]

ActiveStates == {"COLLECTING", "COMPUTING", "AWAITING_CONSENSUS", "TRANSFERRING"}
States == ActiveStates \cup {"IDLE", "STOPPED"}
NoOutcome == [epoch |-> 0, kind |-> "none", reason |-> "none", commits |-> 0]

InitialCore(live) ==
    [state |-> "IDLE", step |-> 0, epoch |-> 0, round |-> 0, posted |-> NoVote, read_due |-> Never,
     post_due |-> IdleInterval, lag |-> Lag, plan |-> NoPlan, chunk |-> 0, staged |-> 0, decided |-> 0,
     commit_due |-> Never, leaving |-> FALSE, abort |-> 0, stop |-> 0,
     request |-> FALSE, freeze |-> FALSE, frozen |-> FALSE, drained |-> TRUE, earliest |-> 0, entered |-> 0, epoch_start |-> 0,
     progressed |-> 0, live |-> live, outcome |-> NoOutcome]

Active(c) == c.state \in ActiveStates
HasPosted(c) == c.posted # NoVote
InWindow(c) == HasPosted(c) /\ PromisesCommit(c.posted)
(* Within a step commits come first, then a round is read, then one is posted. *)
CommitIsDue(c) == c.decided > 0 /\ c.step >= c.commit_due
ReadIsDue(c) == HasPosted(c) /\ c.step >= c.read_due /\ ~CommitIsDue(c)
PostIsDue(c) == ~HasPosted(c) /\ c.step >= c.post_due /\ ~CommitIsDue(c)
(* The first chunk that no round has decided to commit. *)
NextChunk(c) == c.chunk + c.decided

Enter(c, state) == [c EXCEPT !.state = state, !.entered = c.step]
SetAbort(c, reason) == [c EXCEPT !.abort = IF @ = 0 THEN Abort[reason] ELSE @]

(* -- what the engine asks for ----------------------------------------------------------------------------- *)

request_rebalance(c) == [c EXCEPT !.request = TRUE]
request_freeze(c) == [c EXCEPT !.freeze = TRUE]
request_unfreeze(c) == [c EXCEPT !.freeze = FALSE]
request_abort(c) == IF Active(c) THEN SetAbort(c, "REQUESTED") ELSE c
request_stop(c) == [c EXCEPT !.stop = Stop.CLOSED]

(* -- local: they change nothing but the next vote ------------------------------------------------------------ *)

load_collected(c, epoch) ==
    IF epoch = c.epoch /\ c.state = "COLLECTING" THEN Enter(c, "COMPUTING") ELSE c
plan_ready(c, epoch, plan) ==
    IF epoch = c.epoch /\ c.state = "COMPUTING" THEN Enter([c EXCEPT !.plan = plan], "AWAITING_CONSENSUS") ELSE c
chunk_staged(c, epoch, chunk) ==
    IF epoch = c.epoch /\ c.state = "TRANSFERRING" THEN [c EXCEPT !.staged = chunk + 1] ELSE c
work_failed(c, epoch, reason) == IF epoch = c.epoch /\ Active(c) THEN SetAbort(c, reason) ELSE c
transport_lost(c) == [c EXCEPT !.stop = Stop.TRANSPORT]

(* -- posting ------------------------------------------------------------------------------------------------ *)

Progress(c) ==
    CASE ~Active(c) -> IdleVote
      [] c.state = "TRANSFERRING" -> IF c.staged > NextChunk(c) THEN StagedVote ELSE StagingVote
      [] c.state = "AWAITING_CONSENSUS" -> IF IsSkip(c.plan) THEN SkipVote ELSE ReadyVote
      [] OTHER -> BusyVote

VotedPlan(c) == c.plan

MakeVote(c, pass) ==
    [generation |-> 0, round |-> c.round, step |-> c.step, pass |-> pass, epoch |-> c.epoch, live |-> c.live,
     progress |-> Progress(c), chunk |-> NextChunk(c), staged |-> c.staged,
     num_chunks |-> IF c.plan = NoPlan \/ IsSkip(c.plan) THEN 0 ELSE ChunksOf(c.plan),
     plan |-> VotedPlan(c), abort |-> c.abort, stop |-> c.stop, request |-> c.request, drained |-> c.drained,
     freeze |-> c.freeze, earliest |-> c.earliest]

(* A deadline votes; it never acts. *)
VoteOnDeadlines(c) ==
    LET waited == c.step - c.entered
    IN IF Active(c) /\ waited > DeadlineIn(c.state, c.plan) THEN SetAbort(c, "DEADLINE_" \o c.state)
       ELSE IF ~Active(c) /\ ~c.drained /\ waited > DrainDeadline THEN [c EXCEPT !.stop = Stop.TRANSPORT]
       ELSE c

post_vote(c, pass, drained) ==
    LET due == VoteOnDeadlines([c EXCEPT !.drained = drained])
        counted == [due EXCEPT !.round = @ + 1]
    IN [counted EXCEPT !.posted = MakeVote(counted, pass), !.read_due = c.step + c.lag]

(* -- what a decision does ------------------------------------------------------------------------------------ *)

EndEpoch(c, state, kind, reason) ==
    Enter([c EXCEPT !.outcome = [epoch |-> c.epoch, kind |-> kind, reason |-> reason, commits |-> c.chunk],
                    !.plan = NoPlan, !.chunk = 0, !.staged = 0, !.decided = 0, !.commit_due = Never, !.abort = 0], state)

StopRebalancing(c, reason) ==
    LET quiet == [c EXCEPT !.post_due = Never, !.read_due = Never, !.posted = NoVote, !.leaving = FALSE]
    IN IF Active(c) THEN EndEpoch(quiet, "STOPPED", "FAILED", reason) ELSE Enter(quiet, "STOPPED")

StartEpoch(c) ==
    Enter([c EXCEPT !.epoch = @ + 1, !.epoch_start = c.step, !.progressed = c.step, !.chunk = 0, !.staged = 0,
                    !.plan = NoPlan, !.abort = 0, !.request = FALSE], "COLLECTING")

BeginTransfer(c) == Enter([c EXCEPT !.progressed = c.step], "TRANSFERRING")
SkipEpoch(c) == EndEpoch(c, "IDLE", "SKIPPED", "none")
FinishEpoch(c) == EndEpoch(c, "IDLE", "COMMITTED", "none")

(* A step that commits does nothing else if it can: what a round has decided becomes live at the steps after the one at
   which it was read, one chunk at each. In the synchronous mode there is only one step. *)
StepsPerCommit(c) == IF c.lag = 0 THEN 0 ELSE 1
DecideCommits(c, chunks) ==
    [c EXCEPT !.decided = chunks, !.progressed = c.step, !.commit_due = c.read_due + StepsPerCommit(c)]

AbortEpoch(c, reason) ==
    EndEpoch([c EXCEPT !.earliest = c.step + Backoff, !.request = TRUE], "IDLE", "ABORTED", reason)

Apply(c, decision) ==
    LET idle == IF Active(c) THEN c ELSE [c EXCEPT !.frozen = (decision.kind = "FREEZE")]
    IN CASE decision.kind = "STOP" -> StopRebalancing(c, decision.reason)
         [] decision.kind = "START" -> StartEpoch(idle)
         [] decision.kind = "SKIP" -> SkipEpoch(c)
         [] decision.kind = "BEGIN" -> BeginTransfer(c)
         [] decision.kind = "COMMIT" -> DecideCommits(c, decision.chunks)
         [] decision.kind = "ABORT" -> AbortEpoch(c, decision.reason)
         [] OTHER -> idle

(* A round that is posted now has something to decide, and all that was decided before is live when it is read. *)
MayPostNext(c) ==
    /\ c.state # "STOPPED" /\ ~c.leaving
    /\ c.decided > 0 => NextChunk(c) < ChunksOf(c.plan) /\ c.decided <= c.lag

(* While active rounds are the rarer the longer ranks wait, while idle at the multiples of the interval. *)
Pause(waited) == Smallest({waited \div WaitedPerPause, IdleInterval})
ScheduleNext(c) ==
    LET last == IF c.lag = 0 THEN c.step ELSE c.step - 1
    IN CASE ~MayPostNext(c) -> [c EXCEPT !.post_due = Never]
         [] Active(c) -> [c EXCEPT !.post_due = c.step + Pause(c.step - c.progressed)]
         [] OTHER -> [c EXCEPT !.post_due = ((last \div IdleInterval) + 1) * IdleInterval]

read_round(c, decision) ==
    ScheduleNext([Apply([c EXCEPT !.posted = NoVote], decision) EXCEPT !.read_due = Never])

commit_chunk(c) ==
    LET due == IF c.decided = 1 THEN Never ELSE c.step + StepsPerCommit(c)
        next == [c EXCEPT !.chunk = @ + 1, !.decided = @ - 1, !.progressed = c.step, !.commit_due = due,
                          !.live = Successor(@, c.plan, c.chunk)]
        ended == IF next.chunk = ChunksOf(c.plan) THEN FinishEpoch(next) ELSE next
    IN IF HasPosted(c) THEN ended ELSE ScheduleNext(ended)

(* -- leaving alone ------------------------------------------------------------------------------------------ *)

(* A last vote, which says STOP and which this rank does not read; after_last_vote is its core from then on. *)
Leaving(c, reason) == [c EXCEPT !.stop = Stop[reason], !.round = @ + 1]
last_vote(c, reason) == MakeVote(Leaving(c, reason), 0)
after_last_vote(c, reason) == StopRebalancing(Leaving(c, reason), reason)

(* What the round committed, 0 for nothing. The last vote is cast with it, and once that is live, the rank stops. *)
resolve_round(c, chunks, reason) ==
    LET known == [c EXCEPT !.posted = NoVote, !.leaving = TRUE, !.stop = Stop[reason]]
        applied == IF chunks > 0 THEN DecideCommits(known, chunks) ELSE AbortEpoch(known, "UNRESOLVED_VOTE")
    IN ScheduleNext([applied EXCEPT !.read_due = Never])

(* -- resolving a lost decision: core/resolution.py -------------------------------------------------------------- *)

(* posted and staged: its last vote; read and read_commits: the last decision it read, and the chunks that it
   committed; gave_up: the round whose decision it will never read; stopped_from: from this round on it votes nothing
   but STOP. *)
EmptyJournal == [posted |-> 0, staged |-> FALSE, read |-> 0, read_commits |-> 0, gave_up |-> 0,
                 stopped_from |-> Never]

DidNotVoteStaged(journal, round) ==
    journal.stopped_from <= round \/ (journal.posted = round /\ ~journal.staged)

(* The chunks that the round committed, 0 for ABORT, or Open while a rank that may have read it has said nothing. *)
Open == -1
resolve(journals, round) ==
    IF \E j \in journals : j.read = round
    THEN Largest({j.read_commits : j \in {one \in journals : one.read = round}})
    ELSE IF (\E j \in journals : DidNotVoteStaged(j, round)) \/ (\A j \in journals : j.gave_up = round) THEN 0
    ELSE Open

(* -- what must hold of the cores of all ranks -------------------------------------------------------------------- *)

SamePlanIn(cores) ==
    \A one, two \in DOMAIN cores :
        cores[one].state = "TRANSFERRING" /\ cores[two].state = "TRANSFERRING" /\ cores[one].epoch = cores[two].epoch
            => cores[one].plan = cores[two].plan

(* Who transfers does so with the plan of every other rank that serves, unless that has left the epoch since. *)
NoTransferWithoutConsensusIn(cores, serving) ==
    \A r \in DOMAIN cores, other \in serving :
        cores[r].state = "TRANSFERRING" =>
            \/ cores[other].epoch = cores[r].epoch /\ cores[other].plan = cores[r].plan
            \/ cores[other].outcome.epoch >= cores[r].epoch

(* A promise is one of chunks that are staged, the next to be committed; and so is what a round has decided. *)
CommitCannotFailIn(c) ==
    /\ InWindow(c) => c.state = "TRANSFERRING" /\ c.staged >= c.posted.staged /\ NextChunk(c) = c.posted.chunk
    /\ c.decided > 0 => c.state = "TRANSFERRING" /\ NextChunk(c) <= c.staged

OutcomeRecordedIn(c) == c.epoch > 0 /\ ~Active(c) => c.outcome.epoch = c.epoch

(* core/deadlines.py derives it. *)
FirstVotePast(deadline, lag) == deadline + lag + Pause(deadline + lag)
EpochBound(plan, lag) ==
    LET computing == FirstVotePast(DeadlineIn("COLLECTING", plan), lag)
        awaiting == FirstVotePast(computing + DeadlineIn("COMPUTING", plan), lag)
        decided == awaiting + DeadlineIn("AWAITING_CONSENSUS", plan)
        moved == decided + lag + FirstVotePast(DeadlineIn("TRANSFERRING", plan), lag) + NumBuffers - 1
    IN Largest({FirstVotePast(decided, lag), moved}) + lag
EpochBoundedIn(c) == Active(c) => c.step - c.epoch_start <= EpochBound(c.plan, c.lag)
=============================================================================
