------------------------------ MODULE Rebalance ------------------------------
(* The ranks of one domain: cores, the rounds between them, their workers, what is on the wire, the staging buffers,
   and the devices that run behind their hosts.

   One action is one thing that a rank, its worker, its device or the network does. Names of actions are those of
   traces (observe/events.py) where a rank records them. *)
EXTENDS Core, Sequences, TLC

NumRanks == Setup.num_ranks
IsLockstep == Setup.is_lockstep      \* a forward pass needs every rank in it
HasPassIds == Setup.has_pass_ids     \* step() is told the number of the forward pass
MaxAhead == Setup.max_ahead          \* forward passes that a host may be ahead of its device
Asking == Setup.asking               \* ranks that want a rebalance from the start
Plans == Setup.plans                 \* what a policy may return: of "a", "b", "skip"
IsDependent == Setup.is_dependent    \* the second chunk reads a row that the first one writes
Faults == Setup.faults               \* function from the kinds of faults to how often each may happen in a behaviour

Ranks == 0 .. NumRanks - 1
Chunks == 0 .. NumChunks - 1

(* Two slots on each rank, one expert in each: 2r and 2r + 1 belong to rank r. *)
Slots == 0 .. 2 * NumRanks - 1
Owner(slot) == slot \div 2
Own(rank) == {2 * rank, 2 * rank + 1}
InitialPlacement == [slot \in Slots |-> slot]
Damaged == -1
Usual == CHOOSE plan \in Plans : plan = "a" \/ "a" \notin Plans
(* A row carries a hash of what it held when it was packed. *)
Verified(rows) == \A slot \in DOMAIN rows : rows[slot] # Damaged

(* A chunk swaps two slots. Plan "a" begins with the first slots of two ranks and plan "b" with the second ones; the
   other chunks alternate, or move on to the row that the chunk before them wrote. *)
First(plan) == IF plan = "a" THEN <<0, 2>> ELSE <<1, 3>>
Other(plan) == IF IsDependent THEN (IF plan = "a" THEN <<1, 2>> ELSE <<0, 3>>)
               ELSE (IF plan = "a" THEN <<1, 3>> ELSE <<0, 2>>)
Swap(plan, chunk) == IF chunk % 2 = 0 THEN First(plan) ELSE Other(plan)
Touched(plan, chunk) == {Swap(plan, chunk)[1], Swap(plan, chunk)[2]}
Partner(plan, chunk, slot) == IF Swap(plan, chunk)[1] = slot THEN Swap(plan, chunk)[2] ELSE Swap(plan, chunk)[1]
Swapped(live, plan, chunk) ==
    [slot \in Slots |-> IF slot \in Touched(plan, chunk) THEN live[Partner(plan, chunk, slot)] ELSE live[slot]]

(* Where the expert for a slot comes from: the placement after the chunks before it. *)
SourceOf(plan, chunk, slot) == Partner(plan, chunk, slot)

Conflict(plan, one, two) == Touched(plan, one) \cap Touched(plan, two) # {}
(* The chunk whose commit must come before this one is staged: its buffer is free then, and no row that this one
   reads or writes is touched by a chunk in between; -1 for none. *)
BeginAfter(plan, chunk) ==
    LET conflicting == {c \in Chunks : c < chunk /\ Conflict(plan, c, chunk)}
    IN Largest(conflicting \cup {chunk - NumBuffers, -1})

VARIABLES
    core,      \* what each rank knows of the protocol
    pass,      \* forward passes that each rank has enqueued
    up,        \* "up", "left" (closed: it serves no more), "crashed", or "failed" (fail-stop)
    cast,      \* the last three votes of each rank, the newest first: others may be as far behind
    window,    \* "no", "resolving" (it gave up reading a decision that it had voted staged for), "resolved"
    journal,   \* what each rank knows of its rounds ...
    board,     \* ... and what of that the others can see
    jobs,      \* each rank's queue of background work, the oldest first
    worker,    \* FALSE once the worker of a rank is dead
    wire,      \* rows under way between ranks
    buffers,   \* each rank's staging buffers
    begun,     \* chunks of the plan whose staging each rank has queued
    enqueued,  \* commits that each host has enqueued
    queue,     \* each device's queue
    device,    \* what each device holds: its own rows, the map, and how much it has executed
    budget     \* faults that may still happen

vars == <<core, pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
          device, budget>>

Empty == [epoch |-> 0, chunk |-> 0, rows |-> <<>>]

Init ==
    /\ core = [r \in Ranks |-> [InitialCore(InitialPlacement) EXCEPT !.request = (r \in Asking)]]
    /\ pass = [r \in Ranks |-> 0]
    /\ up = [r \in Ranks |-> "up"]
    /\ cast = [r \in Ranks |-> <<NoVote, NoVote, NoVote>>]
    /\ window = [r \in Ranks |-> "no"]
    /\ journal = [r \in Ranks |-> EmptyJournal]
    /\ board = [r \in Ranks |-> EmptyJournal]
    /\ jobs = [r \in Ranks |-> <<>>]
    /\ worker = [r \in Ranks |-> TRUE]
    /\ wire = {}
    /\ buffers = [r \in Ranks |-> [b \in 0 .. NumBuffers - 1 |-> Empty]]
    /\ begun = [r \in Ranks |-> 0]
    /\ enqueued = [r \in Ranks |-> 0]
    /\ queue = [r \in Ranks |-> <<>>]
    /\ device = [r \in Ranks |-> [rows |-> [s \in Own(r) |-> s], map |-> InitialPlacement, passes |-> 0, commits |-> 0]]
    /\ budget = Faults

IsUp(r) == up[r] = "up"
May(fault) == budget[fault] > 0
Spend(fault) == budget' = [budget EXCEPT ![fault] = @ - 1]

(* -- devices ------------------------------------------------------------------------------------------------ *)

(* A device executes its queue in order. Here a forward pass reads the map and the rows, and a commit writes both. *)
Executed(r, dev, operation) ==
    IF operation.kind = "forward" THEN [dev EXCEPT !.passes = @ + 1]
    ELSE LET staged == buffers[r][operation.buffer].rows
         IN [dev EXCEPT !.rows = [s \in DOMAIN @ |-> IF s \in DOMAIN staged THEN staged[s] ELSE @[s]],
                        !.map = operation.map, !.commits = @ + 1]

(* A host that runs in step with its device has an operation executed at once. *)
Enqueue(r, operation) ==
    IF MaxAhead = 0
    THEN /\ device' = [device EXCEPT ![r] = Executed(r, @, operation)]
         /\ UNCHANGED queue
    ELSE /\ queue' = [queue EXCEPT ![r] = Append(@, operation)]
         /\ UNCHANGED device

Execute(r) ==
    /\ queue[r] # <<>>
    /\ up[r] # "crashed"
    /\ device' = [device EXCEPT ![r] = Executed(r, @, Head(queue[r]))]
    /\ queue' = [queue EXCEPT ![r] = Tail(@)]
    /\ UNCHANGED <<core, pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued,
                   budget>>

PassesBehind(r) == pass[r] - device[r].passes

(* -- forward passes, each followed by a step() ----------------------------------------------------------------- *)

(* Whoever has resolved a round goes on only for what that committed. *)
GoesOn(r) == window[r] = "no" \/ (window[r] = "resolved" /\ core[r].decided > 0)
NothingDue(r) == ~CommitIsDue(core[r]) /\ ~ReadIsDue(core[r]) /\ ~PostIsDue(core[r]) /\ GoesOn(r)
MayPass(r) ==
    /\ IsUp(r)
    /\ IsLockstep => \A other \in Ranks : pass[other] >= pass[r]
    /\ MaxAhead > 0 => PassesBehind(r) < MaxAhead

Forward(r) ==
    /\ MayPass(r)
    /\ NothingDue(r)
    /\ pass' = [pass EXCEPT ![r] = @ + 1]
    /\ core' = [core EXCEPT ![r].step = IF HasPassIds THEN pass[r] + 1 ELSE @ + 1]
    /\ Enqueue(r, [kind |-> "forward"])
    /\ UNCHANGED <<up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, budget>>

(* The engine makes a forward pass and leaves out step(). *)
SkipStep(r) ==
    /\ MayPass(r)
    /\ NothingDue(r)
    /\ May("skip")
    /\ Spend("skip")
    /\ pass' = [pass EXCEPT ![r] = @ + 1]
    /\ Enqueue(r, [kind |-> "forward"])
    /\ UNCHANGED <<core, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued>>

(* The engine calls step() twice after one forward pass. Where it says which pass that was, the second call counts for
   nothing. *)
DoubleStep(r) ==
    /\ IsUp(r)
    /\ NothingDue(r)
    /\ May("double")
    /\ Spend("double")
    /\ core' = [core EXCEPT ![r].step = IF HasPassIds THEN pass[r] ELSE @ + 1]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device>>

(* -- what the engine asks for, between two forward passes --------------------------------------------------------- *)

Ask(r, fault, asked) ==
    /\ IsUp(r)
    /\ core[r].state # "STOPPED"
    /\ May(fault)
    /\ Spend(fault)
    /\ core' = [core EXCEPT ![r] = asked]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device>>

Request(r) == ~core[r].request /\ Ask(r, "request", request_rebalance(core[r]))
Freeze(r) == ~core[r].freeze /\ Ask(r, "freeze", request_freeze(core[r]))
Unfreeze(r) == core[r].freeze /\ Ask(r, "unfreeze", request_unfreeze(core[r]))
AskAbort(r) == Active(core[r]) /\ Ask(r, "abort", request_abort(core[r]))
AskStop(r) == Ask(r, "stop", request_stop(core[r]))

(* -- rounds ------------------------------------------------------------------------------------------------- *)

CastVote(r, vote) == cast' = [cast EXCEPT ![r] = <<vote, @[1], @[2]>>]
(* Votes that all have read are forgotten, once r has read a round. *)
StillNeeded(r, round) ==
    LET ReadTo(rank) == IF rank = r THEN round ELSE journal[rank].read
        Kept(vote) == IF \E rank \in Ranks : ReadTo(rank) < vote.round THEN vote ELSE NoVote
    IN [rank \in Ranks |-> [i \in DOMAIN cast[rank] |-> Kept(cast[rank][i])]]
Forget(r, round) == cast' = StillNeeded(r, round)
HasVoted(r, round) == \E i \in DOMAIN cast[r] : cast[r][i].round = round
VoteOf(r, round) == cast[r][CHOOSE i \in DOMAIN cast[r] : cast[r][i].round = round]
Tally(round) == {VoteOf(r, round) : r \in Ranks}

(* A rank that leaves alone posts one last vote, which says STOP, so that the others follow when they read it. Its
   journal says of which rounds on it votes nothing else, unless it is still in the window: there its last word is
   that it gave up. Whoever has resolved a round has cast it. *)
Leave(r, c, reason) ==
    /\ core' = [core EXCEPT ![r] = after_last_vote(c, reason)]
    /\ IF c.leaving THEN UNCHANGED cast ELSE CastVote(r, last_vote(c, reason))
    /\ journal' = [journal EXCEPT ![r].stopped_from = c.round + 1,
                                  ![r].gave_up = IF InWindow(c) THEN c.round ELSE @]

(* What may come in the place of a vote: one of another membership, which fits but for its generation. The worst of
   those promises what this rank has not staged. *)
OfOtherMembership(vote) ==
    [vote EXCEPT !.generation = 1, !.progress = StagedVote, !.staged = NumChunks, !.abort = 0, !.stop = 0, !.freeze = FALSE]

PassId(r) == IF HasPassIds THEN pass[r] ELSE 0
IsDrained(r) == jobs[r] = <<>>

PostVote(r) ==
    /\ IsUp(r)
    /\ core[r].state # "STOPPED"
    /\ window[r] = "no"
    /\ PostIsDue(core[r])
    /\ Lag = 0 => jobs[r] = <<>>  \* in the synchronous mode the work is done inside the step
    /\ LET c == post_vote(core[r], PassId(r), IsDrained(r))
       IN /\ core' = [core EXCEPT ![r] = c]
          /\ journal' = [journal EXCEPT ![r].posted = c.round, ![r].staged = PromisesCommit(c.posted)]
          /\ \/ CastVote(r, c.posted) /\ UNCHANGED budget
             \/ May("stale") /\ Spend("stale") /\ CastVote(r, OfOtherMembership(c.posted))
    /\ UNCHANGED <<pass, up, window, board, jobs, worker, wire, buffers, begun, enqueued, queue, device>>

NewJob(r, kind, epoch, chunk, plan, after) ==
    [kind |-> kind, epoch |-> epoch, chunk |-> chunk, plan |-> plan, after |-> after, phase |-> "queued"]

(* Chunks are begun in order, as far as commits allow; committed is the last one that is committed, -1 for none. *)
RECURSIVE StageUpTo(_, _, _, _, _)
StageUpTo(r, c, first, committed, commits) ==
    IF first = NumChunks \/ BeginAfter(c.plan, first) > committed THEN <<>>
    ELSE <<NewJob(r, "stage", c.epoch, first, c.plan, commits)>> \o StageUpTo(r, c, first + 1, committed, commits)

BeginStaging(r, c, first, committed, commits) ==
    LET more == StageUpTo(r, c, first, committed, commits)
    IN /\ jobs' = [jobs EXCEPT ![r] = @ \o more]
       /\ begun' = [begun EXCEPT ![r] = first + Len(more)]

CommitOperation(r, c) ==
    [kind |-> "commit", buffer |-> c.chunk % NumBuffers, epoch |-> c.epoch, chunk |-> c.chunk,
     map |-> Successor(c.live, c.plan, c.chunk)]

(* What a round has decided becomes live in order, one chunk a step. *)
CarryOutCommit(r) ==
    /\ Enqueue(r, CommitOperation(r, core[r]))
    /\ enqueued' = [enqueued EXCEPT ![r] = @ + 1]
    /\ BeginStaging(r, core[r], begun[r], core[r].chunk, enqueued[r] + 1)

CommitChunk(r) ==
    /\ IsUp(r)
    /\ CommitIsDue(core[r])
    /\ CarryOutCommit(r)
    /\ core' = [core EXCEPT ![r] = commit_chunk(@)]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, worker, wire, buffers, budget>>

CarryOut(r, decision) ==
    CASE decision.kind = "START" ->
           /\ jobs' = [jobs EXCEPT ![r] = Append(@, NewJob(r, "plan", core[r].epoch + 1, 0, NoPlan, enqueued[r]))]
           /\ UNCHANGED <<begun, enqueued, queue, device>>
      [] decision.kind = "BEGIN" ->
           /\ BeginStaging(r, core[r], 0, -1, enqueued[r])
           /\ UNCHANGED <<enqueued, queue, device>>
      [] OTHER -> UNCHANGED <<jobs, begun, enqueued, queue, device>>

(* The result of a round reaches each rank at its own time: reading it may come any time after all have posted. *)
AllHaveVoted(round) == \A r \in Ranks : HasVoted(r, round)
DecisionFor(r) == Decide(Tally(core[r].posted.round))

(* Whoever has given up reading a decision never reads it. *)
MayRead(r) == window[r] = "no"

ReadRound(r) ==
    /\ IsUp(r)
    /\ MayRead(r)
    /\ ReadIsDue(core[r])
    /\ AllHaveVoted(core[r].posted.round)
    /\ LET decision == DecisionFor(r)
       IN /\ core' = [core EXCEPT ![r] = read_round(@, decision)]
          /\ journal' = [journal EXCEPT ![r].read = core[r].posted.round,
                                        ![r].read_commits = decision.chunks,
                                        ![r].stopped_from = IF decision.kind = "STOP" THEN core[r].posted.round + 1
                                                            ELSE @]
          /\ CarryOut(r, decision)
    /\ Forget(r, core[r].posted.round)
    /\ UNCHANGED <<pass, up, window, board, worker, wire, buffers, budget>>

(* The commit that was promised raises: a last vote, and no further forward pass. *)
CommitFailed(r) ==
    /\ IsUp(r)
    /\ CommitIsDue(core[r])
    /\ May("commit")
    /\ Spend("commit")
    /\ Leave(r, core[r], "COMMIT_FAILED")
    /\ up' = [up EXCEPT ![r] = "failed"]
    /\ UNCHANGED <<pass, window, board, jobs, worker, wire, buffers, begun, enqueued, queue, device>>

(* -- rounds that are lost ------------------------------------------------------------------------------------ *)

(* With cause, when some rank has not posted; and without, when only the result is late. *)
Missing(r) == ReadIsDue(core[r])

(* Outside the window nothing can have been committed without this rank: it stops alone. After a resolution it stops
   once all that is live which it has found to be committed. *)
MayGiveUp(r) == ~InWindow(core[r])
AllIsLive(r) == core[r].decided = 0

GiveUp(r, reason) ==
    /\ IsUp(r)
    /\ \/ /\ window[r] = "no"
          /\ Missing(r)
          /\ MayGiveUp(r)
          /\ May("timeout")
          /\ Spend("timeout")
       \/ /\ window[r] = "resolved"
          /\ AllIsLive(r)
          /\ UNCHANGED budget
    /\ Leave(r, core[r], reason)
    /\ window' = [window EXCEPT ![r] = "no"]
    /\ UNCHANGED <<pass, up, board, jobs, worker, wire, buffers, begun, enqueued, queue, device>>

(* Inside the window it holds, and gives up reading the decision from the channel. That is binding. *)
GiveUpReading(r) ==
    /\ IsUp(r)
    /\ window[r] = "no"
    /\ Missing(r)
    /\ InWindow(core[r])
    /\ May("timeout")
    /\ Spend("timeout")
    /\ window' = [window EXCEPT ![r] = "resolving"]
    /\ journal' = [journal EXCEPT ![r].gave_up = core[r].posted.round]
    /\ UNCHANGED <<core, pass, up, cast, board, jobs, worker, wire, buffers, begun, enqueued, queue, device>>

(* A watchdog shows what its rank knows. *)
Publish(r) ==
    /\ up[r] \in {"up", "left"}
    /\ board[r] # journal[r]
    /\ \E other \in Ranks : window[other] = "resolving"
    /\ board' = [board EXCEPT ![r] = journal[r]]
    /\ UNCHANGED <<core, pass, up, cast, window, journal, jobs, worker, wire, buffers, begun, enqueued, queue,
                   device, budget>>

Verdict(r) == resolve({board[other] : other \in Ranks \ {r}} \cup {journal[r]}, core[r].posted.round)

ResolveRound(r, reason) ==
    /\ IsUp(r)
    /\ window[r] = "resolving"
    /\ Verdict(r) # Open
    /\ window' = [window EXCEPT ![r] = "resolved"]
    /\ board' = [board EXCEPT ![r] = journal[r]]
    /\ LET resolved == resolve_round(core[r], Verdict(r), reason)
       IN /\ core' = [core EXCEPT ![r] = resolved]
          /\ cast' = [StillNeeded(r, core[r].posted.round) EXCEPT ![r] = <<last_vote(resolved, reason), @[1], @[2]>>]
    /\ journal' = [journal EXCEPT ![r].read = core[r].posted.round, ![r].read_commits = Verdict(r),
                                  ![r].stopped_from = core[r].round + 1]
    /\ UNCHANGED <<pass, up, jobs, worker, wire, buffers, begun, enqueued, queue, device, budget>>

(* Some rank said nothing for too long: serving on could tear the map. *)
FailStop(r) ==
    /\ IsUp(r)
    /\ window[r] = "resolving"
    /\ Verdict(r) = Open
    /\ up' = [up EXCEPT ![r] = "failed"]
    /\ UNCHANGED <<core, pass, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued,
                   queue, device, budget>>

(* A rank leaves for good, or its process dies. *)
Close(r) ==
    /\ IsUp(r)
    /\ core[r].state # "STOPPED"
    /\ window[r] # "resolving"
    /\ May("close")
    /\ Spend("close")
    /\ Leave(r, core[r], "CLOSED")
    /\ up' = [up EXCEPT ![r] = "left"]
    /\ UNCHANGED <<pass, window, board, jobs, worker, wire, buffers, begun, enqueued, queue, device>>

Crash(r) ==
    /\ up[r] # "crashed"
    /\ May("crash")
    /\ Spend("crash")
    /\ up' = [up EXCEPT ![r] = "crashed"]
    /\ UNCHANGED <<core, pass, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued,
                   queue, device>>

(* -- the worker ---------------------------------------------------------------------------------------------- *)

(* Jobs are executed in order and each to its end, also when its epoch is over. *)
HasJob(r, kind, phase) == jobs[r] # <<>> /\ Head(jobs[r]).kind = kind /\ Head(jobs[r]).phase = phase
Job(r) == Head(jobs[r])
Advance(r, phase) == jobs' = [jobs EXCEPT ![r] = <<[@[1] EXCEPT !.phase = phase]>> \o Tail(@)]
EndJob(r) == jobs' = [jobs EXCEPT ![r] = Tail(@)]

(* The decode thread takes what the worker reports inside step(), before it posts. *)
Takes(r) == IsUp(r) /\ GoesOn(r) /\ ~CommitIsDue(core[r]) /\ ~ReadIsDue(core[r])

LoadCollected(r) ==
    /\ Takes(r)
    /\ worker[r]
    /\ HasJob(r, "plan", "queued")
    /\ core' = [core EXCEPT ![r] = load_collected(@, Job(r).epoch)]
    /\ Advance(r, "collected")
    /\ UNCHANGED <<pass, up, cast, window, journal, board, worker, wire, buffers, begun, enqueued, queue,
                   device, budget>>

(* A policy may return another plan on one rank. *)
PlanReady(r, plan) ==
    /\ Takes(r)
    /\ worker[r]
    /\ HasJob(r, "plan", "collected")
    /\ plan \in Plans
    /\ IF plan = Usual THEN UNCHANGED budget ELSE May("plan") /\ Spend("plan")
    /\ core' = [core EXCEPT ![r] = plan_ready(@, Job(r).epoch, plan)]
    /\ EndJob(r)
    /\ UNCHANGED <<pass, up, cast, window, journal, board, worker, wire, buffers, begun, enqueued, queue,
                   device>>

Message(r, dst, content) ==
    [epoch |-> Job(r).epoch, chunk |-> Job(r).chunk, dst |-> dst, expert |-> content]

Incoming(r) == {dst \in Touched(Job(r).plan, Job(r).chunk) \cap Own(r) :
                   Owner(SourceOf(Job(r).plan, Job(r).chunk, dst)) # r}
Outgoing(r) == {dst \in Touched(Job(r).plan, Job(r).chunk) \ Own(r) :
                   Owner(SourceOf(Job(r).plan, Job(r).chunk, dst)) = r}
LocalCopies(r) == {dst \in Touched(Job(r).plan, Job(r).chunk) \cap Own(r) :
                     Owner(SourceOf(Job(r).plan, Job(r).chunk, dst)) = r}

RowsAreReady(r) == device[r].commits >= Job(r).after

(* The rows that others need are read once the commits enqueued before this chunk was begun have been executed. *)
Pack(r) ==
    /\ up[r] \in {"up", "left"}
    /\ worker[r]
    /\ HasJob(r, "stage", "queued")
    /\ RowsAreReady(r)
    /\ wire' = wire \cup {Message(r, dst, device[r].rows[SourceOf(Job(r).plan, Job(r).chunk, dst)]) : dst \in Outgoing(r)}
    /\ Advance(r, "packed")
    /\ UNCHANGED <<core, pass, up, cast, window, journal, board, worker, buffers, begun, enqueued, queue,
                   device, budget>>

Arrived(r) == {m \in wire : m.epoch = Job(r).epoch /\ m.chunk = Job(r).chunk /\ m.dst \in Incoming(r)}

IsComplete(r) == {m.dst : m \in Arrived(r)} = Incoming(r)

Staged(r) ==
    [dst \in Incoming(r) \cup LocalCopies(r) |->
        IF dst \in {m.dst : m \in Arrived(r)} THEN (CHOOSE m \in Arrived(r) : m.dst = dst).expert
        ELSE IF dst \in Incoming(r) THEN Damaged
        ELSE device[r].rows[SourceOf(Job(r).plan, Job(r).chunk, dst)]]

(* The rows of all peers are there: they are staged, and checked. That the job is over is seen with it. *)
Stage(r, result) ==
    /\ Takes(r)
    /\ worker[r]
    /\ HasJob(r, "stage", "packed")
    /\ IsComplete(r)
    /\ buffers' = [buffers EXCEPT ![r][Job(r).chunk % NumBuffers] =
                      [epoch |-> Job(r).epoch, chunk |-> Job(r).chunk, rows |-> Staged(r)]]
    /\ wire' = wire \ Arrived(r)
    /\ core' = [core EXCEPT ![r] = result]
    /\ EndJob(r)
    /\ UNCHANGED <<pass, up, cast, window, journal, board, worker, begun, enqueued, queue, device, budget>>

ChunkStaged(r) == Verified(Staged(r)) /\ Stage(r, chunk_staged(core[r], Job(r).epoch, Job(r).chunk))
ChunkDamaged(r) == ~Verified(Staged(r)) /\ Stage(r, work_failed(core[r], Job(r).epoch, "INTEGRITY"))

(* A job raises, at any point of it. *)
WorkFailed(r) ==
    /\ Takes(r)
    /\ worker[r]
    /\ jobs[r] # <<>>
    /\ May("work")
    /\ Spend("work")
    /\ LET reason == CASE Job(r).kind = "stage" -> "TRANSFER_ERROR"
                       [] Job(r).phase = "queued" -> "LOAD_ERROR"
                       [] OTHER -> "POLICY_ERROR"
       IN core' = [core EXCEPT ![r] = work_failed(@, Job(r).epoch, reason)]
    /\ EndJob(r)
    /\ UNCHANGED <<pass, up, cast, window, journal, board, worker, wire, buffers, begun, enqueued, queue, device>>

(* The worker is gone: no job ends any more. The decode thread sees that whenever it looks. *)
WorkerDies(r) ==
    /\ worker[r]
    /\ up[r] = "up"
    /\ May("worker")
    /\ Spend("worker")
    /\ worker' = [worker EXCEPT ![r] = FALSE]
    /\ UNCHANGED <<core, pass, up, cast, window, journal, board, jobs, wire, buffers, begun, enqueued, queue,
                   device>>

WorkerFoundDead(r) ==
    /\ Takes(r)
    /\ ~worker[r]
    /\ Active(core[r])
    /\ core[r].abort = 0
    /\ core' = [core EXCEPT ![r] = work_failed(@, @.epoch, "WORKER_DIED")]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued,
                   queue, device, budget>>

(* The transfer group breaks: what is under way can never be shown to be drained. *)
TransportLost(r) ==
    /\ Takes(r)
    /\ core[r].state # "STOPPED"
    /\ core[r].stop = 0
    /\ May("transport")
    /\ Spend("transport")
    /\ core' = [core EXCEPT ![r] = transport_lost(@)]
    /\ UNCHANGED <<pass, up, cast, window, journal, board, jobs, worker, wire, buffers, begun, enqueued,
                   queue, device>>

(* A row is damaged on its way. *)
Damage(m) ==
    /\ m.expert # Damaged
    /\ May("damage")
    /\ Spend("damage")
    /\ wire' = (wire \ {m}) \cup {[m EXCEPT !.expert = Damaged]}
    /\ UNCHANGED <<core, pass, up, cast, window, journal, board, jobs, worker, buffers, begun, enqueued,
                   queue, device>>

(* ----------------------------------------------------------------------------------------------------------- *)

RankNext(r) ==
    \/ Forward(r) \/ SkipStep(r) \/ DoubleStep(r) \/ Execute(r)
    \/ PostVote(r) \/ ReadRound(r) \/ CommitChunk(r)
    \/ LoadCollected(r) \/ (\E plan \in Plans : PlanReady(r, plan))
    \/ Pack(r) \/ (HasJob(r, "stage", "packed") /\ (ChunkStaged(r) \/ ChunkDamaged(r)))
    \/ WorkFailed(r) \/ WorkerDies(r) \/ WorkerFoundDead(r) \/ TransportLost(r)
    \/ GiveUp(r, "TIMEOUT") \/ GiveUpReading(r) \/ Publish(r) \/ ResolveRound(r, "TIMEOUT") \/ FailStop(r)
    \/ CommitFailed(r) \/ Close(r) \/ Crash(r)
    \/ Request(r) \/ Freeze(r) \/ Unfreeze(r) \/ AskAbort(r) \/ AskStop(r)

Next == (\E r \in Ranks : RankNext(r)) \/ (\E m \in wire : Damage(m))

Spec == Init /\ [][Next]_vars
=============================================================================
