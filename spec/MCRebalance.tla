---------------------------- MODULE MCRebalance ----------------------------
(* What must hold, what must be reachable, and the history that saying so takes. *)
EXTENDS Rebalance

VARIABLES
    used,      \* the map of each forward pass that some rank has still to execute
    commits,   \* every chunk committed by some rank: where, when and of which plan
    aborts     \* every epoch aborted by some rank, and in which round

history == <<used, commits, aborts>>

HistoryInit == used = {} /\ commits = {} /\ aborts = {}

NewlyUsed ==
    {[pass |-> device'[r].passes, map |-> device'[r].map] :
        r \in {rank \in Ranks : device'[rank].passes > device[rank].passes}}
NewCommits ==
    {[epoch |-> core[r].epoch, chunk |-> core[r].chunk, step |-> core[r].step, plan |-> core[r].plan,
      round |-> core[r].posted.round, pass |-> pass[r]] :
        r \in {rank \in Ranks : enqueued'[rank] > enqueued[rank]}}
NewAborts ==
    {[epoch |-> core[r].epoch, round |-> core[r].round] :
        r \in {rank \in Ranks : core'[rank].outcome # core[rank].outcome /\ core'[rank].outcome.kind = "ABORTED"}}

StillToCompare(use) == \E r \in Ranks : up'[r] = "up" /\ device'[r].passes < use.pass

HistoryNext ==
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

SamePlan ==
    \A one, two \in Ranks :
        core[one].state = "TRANSFERRING" /\ core[two].state = "TRANSFERRING" /\ core[one].epoch = core[two].epoch
            => core[one].plan = core[two].plan

NoTransferWithoutConsensus ==
    \A r, other \in Ranks :
        core[r].state = "TRANSFERRING" =>
            \/ core[other].epoch = core[r].epoch /\ core[other].plan = core[r].plan
            \/ core[other].outcome.epoch >= core[r].epoch
            \/ up[other] # "up"

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

CommitCannotFail ==
    \A r \in Ranks : IsUp(r) /\ window[r] # "resolved" /\ InWindow(core[r]) =>
        /\ core[r].state = "TRANSFERRING"
        /\ core[r].staged > core[r].chunk
        /\ core[r].chunk = core[r].posted.chunk

NoCommitAfterAbort ==
    \A commit \in commits : \A abort \in aborts : commit.epoch = abort.epoch => commit.round < abort.round

StoppedHarmless ==
    [][\A r \in Ranks : core[r].state = "STOPPED" =>
          core'[r].state = "STOPPED" /\ core'[r].live = core[r].live /\ enqueued'[r] = enqueued[r]]_<<vars, history>>

OutcomeRecorded == \A r \in Ranks : core[r].epoch > 0 /\ ~Active(core[r]) => core[r].outcome.epoch = core[r].epoch

(* core/deadlines.py derives it. *)
EpochBound ==
    Deadline["COLLECTING"] + Deadline["COMPUTING"] + Deadline["AWAITING_CONSENSUS"] + Deadline["TRANSFERRING"] + 6 * Lag
EpochBounded == \A r \in Ranks : Active(core[r]) => core[r].step - core[r].epoch_start <= EpochBound

(* Who stops has voted in every round that the others have posted by then, so nobody waits for it. *)
NoSilentStop ==
    \A r, other \in Ranks :
        HasPosted(core[r]) /\ core[other].state = "STOPPED" /\ up[other] # "crashed"
            => HasVoted(other, core[r].posted.round)

FrozenIsQuiet == \A r, other \in Ranks : core[r].frozen /\ ~Active(core[other]) => jobs[r] = <<>>

(* -- reachability: each of these, negated, must fail --------------------------------------------------------------- *)

ForwardAfterLastCommit ==
    \E r \in Ranks : \E commit \in commits :
        /\ commit.chunk = NumChunks - 1
        /\ core[r].outcome.kind = "COMMITTED"
        /\ device[r].passes > commit.pass
CommitAfterAbort == \E commit \in commits : \E abort \in aborts : commit.epoch = abort.epoch + 1

NeverForwardAfterLastCommit == ~ForwardAfterLastCommit
NeverCommitAfterAbort == ~CommitAfterAbort
NeverLateWait == \A r \in Ranks : ~(IsUp(r) /\ ReadIsDue(core[r]) /\ ~AllHaveVoted(core[r].posted.round))
NeverResolvedCommit == \A r \in Ranks : ~(window[r] = "resolved" /\ journal[r].read_commit)

(* -- setups of the checks ------------------------------------------------------------------------------------------ *)

NoFaults == [fault \in {"request", "freeze", "unfreeze", "abort", "stop", "timeout", "commit", "close", "crash", "work",
                       "plan", "worker", "transport", "damage", "skip", "double"} |-> 0]

Plain ==
    [lag |-> 1, idle_interval |-> 2, backoff |-> 1,
     deadline |-> [COLLECTING |-> 2, COMPUTING |-> 2, AWAITING_CONSENSUS |-> 3, TRANSFERRING |-> 5], drain_deadline |-> 3,
     num_chunks |-> 2, num_ranks |-> 2, is_lockstep |-> TRUE, has_pass_ids |-> FALSE, num_buffers |-> 2, max_ahead |-> 0,
     asking |-> {0}, plans |-> {"a"}, is_dependent |-> FALSE, faults |-> NoFaults, max_steps |-> 12, max_epochs |-> 1]
=============================================================================
