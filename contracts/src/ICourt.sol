// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Entry, SumNode} from "./SumTree.sol";
import {Commitment, JobRequest, Profile, Verdict, WorkReceipt} from "./Types.sol";

/// @title Court: epochs committed to, validators drawn to look at them, cheats slashed.
/// @notice A provider commits to the jobs of an epoch; a beacon that nobody knew by then picks jobs and validators;
/// these look, commit to verdicts and open them; a quorum decides; the accused may answer or appeal; then its stake is
/// slashed. Faults that documents alone prove need no committee (IFaults).
///
/// Assumptions, stated where the promise is made:
/// - A case rests on its committee: with at most f colluding members of 3f + 1 nobody is condemned or acquitted by
///   them. Documents alone prove the objective faults, and no assumption about validators is needed there.
/// - The beacon is the hash of the block after the commitment's: whoever makes that block can throw one hash away, at
///   the price of the block. A case that nobody drew for 256 blocks takes the newest hash, and whoever draws it then
///   picks the block: validators draw at once, so that this never comes to matter.
/// - Validators were enlisted before the beacon's block, and each one's rank in the draw depends on itself alone:
///   enlisting, retiring or unstaking after the beacon is known changes nobody else's place.
/// - Work is judged once per commitment: a provider's evidence changes by a case once, when the case closes.
/// - A verdict that contradicts its own numbers is refused; an honest validator never dissents with numbers that it did
///   not measure, so only a dissenter whose gaps do not match the quorum's is penalised.
/// - The token is TallyToken or behaves like it (see ITallyToken); Registry and Escrow are those of this deployment.
/// - No owner, no pause, no upgrade.
interface ICourt {
    /// @notice Where a case stands. NONE: nothing was drawn. SUBMIT: members commit to verdicts. REVEAL: they open
    /// them. ANSWER: found guilty, the accused may answer or appeal. CLOSED: `outcome` was carried out. UNDECIDED: no
    /// round reached a quorum, and nobody is punished.
    enum CaseState {
        NONE,
        SUBMIT,
        REVEAL,
        ANSWER,
        CLOSED,
        UNDECIDED
    }

    /// @notice AuditOutcome of protocol/units.py.
    enum Outcome {
        PASS,
        WITHHELD,
        FORGED,
        IMPROBABLE,
        VOID
    }

    /// @notice What a member has done. REMOVED: disqualified. CREDITED: agreed with the quorum and measured the same.
    enum SeatStatus {
        EMPTY,
        SUBMITTED,
        REVEALED,
        REMOVED,
        CREDITED
    }

    /// @notice Constants of the deployment. Windows in seconds, amounts in wei.
    /// @param epochSeconds Length of an epoch; jobs belong to that of their receipts' `receivedAt`.
    /// @param commitWindow From an epoch's end until its commitment is overdue.
    /// @param submitWindow Longest time a round waits for verdicts' digests.
    /// @param revealWindow Longest time it then waits for the verdicts.
    /// @param answerWindow From a guilty verdict to its execution.
    /// @param committees Members of each round, rising.
    /// @param forcedBps Share of commitments that must hold an error, in basis points.
    /// @param validatorStake Active stake without which nobody is drawn.
    /// @param validatorPenalty Taken from a member that claimed what it did not measure.
    /// @param appealBond Put up by the accused for the next committee; burned if that finds it guilty too.
    struct Rules {
        uint32 epochSeconds;
        uint32 commitWindow;
        uint32 submitWindow;
        uint32 revealWindow;
        uint32 answerWindow;
        uint8[3] committees;
        uint16 forcedBps;
        uint96 validatorStake;
        uint96 validatorPenalty;
        uint96 appealBond;
    }

    /// @notice A commitment as kept. `blockNumber`: it was made in. `earlier`: jobs that this provider committed to
    /// under the profile before. `previous`: key of its newest commitment before, zero for none and for
    /// an epoch before that one's. `beacon`: zero until drawn.
    struct Made {
        address provider;
        uint64 epoch;
        uint32 count;
        bytes32 profileId;
        bytes32 root;
        bytes32 lot;
        uint96 total;
        uint40 blockNumber;
        uint64 earlier;
        bytes32 previous;
        bytes32 beacon;
    }

    /// @notice A case as it stands now.
    /// @param until Unix second at which the state's window ends. CLOSED: from which compensation may be burned.
    /// @param outcome What follows for the provider, of the last quorum.
    /// @param found What that quorum agreed on; differs from `outcome` where evidence condemned the provider.
    /// @param bonds Appeals made, each with its bond held here until the case ends.
    /// @param flagPpm The profile's rate of flags granted to honest work.
    /// @param beaconBlock Block whose hash the beacon is from; who enlisted in it or later is not drawn.
    /// @param seats Members of the current round; `submitted` and `revealed`: of them.
    /// @param evidence The provider's after the last quorum, in 1e-18.
    /// @param slashed Wei taken from the provider.
    /// @param pool Wei for the payers of the commitment's jobs; `paid` of it was paid.
    struct Case {
        CaseState state;
        uint8 round;
        uint40 until;
        Outcome outcome;
        Outcome found;
        bool wasForced;
        uint8 bonds;
        uint32 flagPpm;
        uint40 beaconBlock;
        uint8 seats;
        uint8 submitted;
        uint8 revealed;
        uint128 evidence;
        uint96 slashed;
        uint96 pool;
        uint96 paid;
    }

    /// @notice One member of a round. `voids`: saturated at 65,535. `word`: the verdict's digest while SUBMITTED, its
    /// gaps once revealed; one slot serves both.
    struct Seat {
        address validator;
        SeatStatus status;
        Outcome outcome;
        uint32 tokens;
        uint32 flags;
        uint16 voids;
        bytes32 word;
    }

    /// @notice Providers may be judged under this profile. `flagPpm`: its rate of flags granted to honest work.
    event ProfileAccepted(bytes32 indexed profileId, uint32 flagPpm);
    /// @notice `validator` can be drawn from now on.
    event Enlisted(address indexed validator);
    /// @notice `validator` is no longer drawn.
    event Retired(address indexed validator);
    /// @notice A commitment was made. The document itself is in the call's input.
    event Committed(
        bytes32 indexed key,
        address indexed provider,
        bytes32 indexed profileId,
        uint64 epoch,
        uint32 count,
        uint96 total
    );
    /// @notice A case was opened with this beacon and these members.
    event Drawn(bytes32 indexed key, bytes32 beacon, address[] members);
    /// @notice A later round was opened.
    event RoundOpened(bytes32 indexed caseId, uint8 round, address[] members);
    /// @notice A member committed to its verdict's digest.
    event Submitted(bytes32 indexed caseId, address indexed validator, uint8 round, bytes32 digest);
    /// @notice A member opened its verdict.
    event Revealed(bytes32 indexed caseId, address indexed validator, Verdict verdict);
    /// @notice A round was counted. `state`: what came of it; SUBMIT when the next round looks.
    event Concluded(bytes32 indexed caseId, uint8 round, Outcome outcome, CaseState state, uint256 evidence);
    /// @notice The accused answered; `forced`: its error was one it had to make.
    event Answered(bytes32 indexed caseId, bool forced);
    /// @notice The accused appealed to `round`.
    event Appealed(bytes32 indexed caseId, uint8 round);
    /// @notice A verdict was carried out: `slashed` wei were taken.
    event Executed(bytes32 indexed caseId, address indexed provider, Outcome outcome, uint256 slashed);
    /// @notice A member lost `slashed` wei for a verdict that it did not measure.
    event Penalised(bytes32 indexed caseId, address indexed validator, uint256 slashed);
    /// @notice A member agreed with the quorum and measured the same: `tokens` looked at.
    event Credited(bytes32 indexed caseId, address indexed validator, uint256 tokens);
    /// @notice A member did not reveal.
    event Missed(bytes32 indexed caseId, address indexed validator);
    /// @notice An objective fault was punished.
    event FaultProven(
        bytes32 indexed faultId, address indexed accused, uint8 kind, address indexed reporter, uint256 slashed
    );
    /// @notice The payer of job `index` got its share; `caseId` is the fault's id where documents proved it.
    event Compensated(bytes32 indexed caseId, address indexed payer, uint256 index, uint256 amount);
    /// @notice A member's vote does not count: it pays for a job it would judge.
    event Disqualified(bytes32 indexed caseId, address indexed validator, bytes32 jobId);
    /// @notice A bond of the accused went back to it, or was burned.
    event BondReleased(bytes32 indexed caseId, uint256 returned, uint256 burned);
    /// @notice What no payer claimed was burned.
    event RestBurned(bytes32 indexed caseId, uint256 amount);

    /// @notice A window, epoch, stake or committee of zero or too small, committees that do not rise, or above maximum.
    error BadRules();
    /// @notice Stake unbonds in `unbondDelay` seconds, and a case can take `judgement`: its windows twice.
    error UnbondDelayTooShort(uint256 unbondDelay, uint256 judgement);
    /// @notice A profile must grant honest work more than no flag, and at most Evidence.MAX_FLAG_PPM in a million.
    error FlagRate(uint256 flagPpm);
    /// @notice Nobody can be judged under this profile yet.
    error UnknownProfile(bytes32 profileId);
    /// @notice The wallet is enlisted.
    error AlreadyEnlisted(address validator);
    /// @notice The wallet is not enlisted.
    error NotEnlisted(address validator);
    /// @notice No place is free.
    error TooManyValidators(uint256 most);
    /// @notice The wallet has no node key.
    error NotRegistered(address wallet);
    /// @notice A validator needs `minimum` wei of active stake.
    error StakeTooLow(uint256 active, uint256 minimum);
    /// @notice The validator still has the stake that its place needs.
    error StillStaked(address validator);
    /// @notice The document is not signed by the provider's current node key but by `recovered` (zero: by nobody).
    error NotTheProviders(address recovered, address provider);
    /// @notice The epoch ends at `endsAt`.
    error EpochNotOver(uint256 endsAt, uint256 nowSeconds);
    /// @notice There is a commitment under this key.
    error AlreadyCommitted(bytes32 key);
    /// @notice No jobs, but a root or a total.
    error EmptyTree();
    /// @notice There is no commitment under this key.
    error UnknownCommitment(bytes32 key);
    /// @notice A commitment of no jobs is not judged.
    error NothingToJudge(bytes32 key);
    /// @notice The case is open.
    error AlreadyDrawn(bytes32 key);
    /// @notice The beacon exists from block `drawableAt` on.
    error TooEarlyToDraw(uint256 drawableAt, uint256 blockNumber);
    /// @notice Only so many validators can judge this case; it waits for more.
    error NotEnoughValidators(uint256 eligible);
    /// @notice No case was drawn under this id.
    error UnknownCase(bytes32 caseId);
    /// @notice Not the time for it: the case is in `state` until `until`.
    error WrongPhase(CaseState state, uint256 until);
    /// @notice The wallet has no seat in the case's current round.
    error NotAMember(address validator);
    /// @notice The member has submitted, or was disqualified.
    error AlreadySubmitted(address validator);
    /// @notice The member has revealed, or was disqualified.
    error AlreadyRevealed(address validator);
    /// @notice Zero is no digest.
    error ZeroDigest();
    /// @notice The verdict is not the one that the member submitted for this round.
    error NotWhatWasSubmitted(address validator);
    /// @notice The outcome is not what the verdict's own numbers give.
    error ContradictsItself(uint8 outcome);
    /// @notice `caller` is not the accused.
    error NotTheAccused(address caller, address provider);
    /// @notice The commitment did not have to hold an error, or the secret is not of the lot before it.
    error NotForced();
    /// @notice There is no round after this.
    error NoFurtherRound(uint8 round);
    /// @notice The entry is not at this index of the commitment, or the receipt or signed request is not the entry's.
    error NotInTheTree();
    /// @notice `validator` does not pay for this job; `payer` does.
    error NotItsOwnCase(address validator, address payer);
    /// @notice Nobody owns a channel that this job was paid from.
    error NoPayer(address client);
    /// @notice The share of this job was paid.
    error AlreadyCompensated(uint256 index);
    /// @notice The case was not executed, or nothing of its pool is left.
    error NothingToPay();

    /// @notice Let providers be judged under `profile`. Anybody may call: the id is the document's hashStruct.
    /// @return profileId By which commitments name it. Accepting twice changes nothing.
    function registerProfile(Profile calldata profile) external returns (bytes32 profileId);

    /// @notice Let the caller be drawn: it needs a node key and the validators' stake.
    function enlist() external;

    /// @notice No longer be drawn. Seats already given stay.
    function retire() external;

    /// @notice Remove an enlisted validator whose active stake no longer suffices. Anybody may call, so that places
    /// cannot be held without stake.
    function expel(address validator) external;

    /// @notice Commit to an epoch's jobs, once it is over. Anybody may submit it; only the provider's current node key
    /// can have signed it. Too late is better than never: the jobs are audited, but see IFaults.UNCOMMITTED.
    /// @return key keccak256(abi.encode(provider, profileId, epoch)): the commitment's and its case's id.
    function commit(Commitment calldata commitment, bytes calldata signature) external returns (bytes32 key);

    /// @notice Fix the beacon of a commitment whose following block exists, and seat the first committee. Anybody.
    function draw(bytes32 key) external;

    /// @notice As a member: commit to the EIP-712 digest of a verdict.
    function submit(bytes32 caseId, bytes32 digest) external;

    /// @notice As a member: open the verdict, once all have submitted or the time for it is over.
    /// @dev What is refused: another document than committed to; counts that cannot be; an outcome that its own worst
    /// job contradicts.
    function reveal(Verdict calldata verdict) external;

    /// @notice Count the round, once all who submitted revealed or the time for it is over. Anybody.
    /// @dev PASS closes the case; a guilty outcome opens the answer window; no quorum, or VOID before the last round,
    /// seats the next committee. In the last round no quorum leaves the case undecided, VOID closes it unpunished.
    function conclude(bytes32 caseId) external;

    /// @notice Carry out a guilty verdict whose answer window is over. Anybody.
    /// @dev Of the bounty one half is divided among the credited members, the other is the pool of the commitment's
    /// payers. A provider slashed for improbable tokens begins again with no evidence against it.
    function execute(bytes32 caseId) external;

    /// @notice As the accused: show that the improbable tokens were a forced error, which closes the case unpunished.
    /// @dev Only an IMPROBABLE outcome is excused so: documents and delivery are due of forced commitments too. Nor are
    /// more flags excused than one planted error explains (Bench.excused).
    /// @param secret Preimage of the lot of the provider's commitment before.
    function answer(bytes32 caseId, bytes32 secret) external;

    /// @notice As the accused: ask the next, larger committee, for the bond.
    function appeal(bytes32 caseId) external;

    /// @notice Punish an objective fault. The caller is the reporter: half of the bounty is its own, the other half is
    /// the payer's, where there is one, up to what it paid, and burned beyond that.
    /// @param kind Of IFaults.
    /// @param proof ABI encoding of the kind's documents.
    function prove(uint8 kind, bytes calldata proof) external;

    /// @notice Send the payer of a committed job its share of an executed case: min(amount, pool * amount / total).
    /// @dev Anybody may call; the money goes to the owner of the channel that the receipt's client key spends from.
    /// @param siblings From the leaf up (SumTree).
    /// @param receipt The one whose digest is the entry's.
    function compensate(
        bytes32 caseId,
        Entry calldata entry,
        uint256 index,
        SumNode[] calldata siblings,
        WorkReceipt calldata receipt
    ) external;

    /// @notice Burn what no payer claimed of a case within the compensation window. Anybody.
    function burnRest(bytes32 caseId) external;

    /// @notice Strike the vote of a member of the current round that owns the channel of a committed job. Anybody,
    /// until the round is concluded. The seat stays, so a quorum is no easier to reach.
    /// @param request Whose digest is the job's id, with its client's `signature`: no provider can name a member as the
    /// buyer of a job that it never ordered.
    function disqualify(
        bytes32 caseId,
        Entry calldata entry,
        uint256 index,
        SumNode[] calldata siblings,
        JobRequest calldata request,
        bytes calldata signature,
        address member
    ) external;

    /// @notice Constants of the deployment.
    function rules() external view returns (Rules memory);

    /// @notice A commitment; all zero when there is none.
    function commitments(bytes32 key) external view returns (Made memory);

    /// @notice A case as it stands now: a submit window that is over reads as REVEAL. All zero before the draw.
    function caseOf(bytes32 caseId) external view returns (Case memory);

    /// @notice Seats of a round, in the order of the draw; empty when it was not opened.
    function seatsOf(bytes32 caseId, uint8 round) external view returns (Seat[] memory);

    /// @notice Enlisted validators. Their order means nothing.
    function validators() external view returns (address[] memory);

    /// @notice Evidence against the provider, in 1e-18; 1 before its first case.
    function evidenceOf(address provider) external view returns (uint256);

    /// @notice What a validator did: tokens credited, seats that it left without a verdict.
    function creditsOf(address validator) external view returns (uint128 tokens, uint128 missed);

    /// @notice Rate of flags granted to honest work under a profile, in parts per million; zero: not accepted.
    function profileFlagPpm(bytes32 profileId) external view returns (uint32);

    /// @notice Unix second since which providers can be judged under a profile; zero: never.
    function profileSince(bytes32 profileId) external view returns (uint40);
}
