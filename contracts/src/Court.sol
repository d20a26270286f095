// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";
import {Finding} from "./Bench.sol";
import {Chamber} from "./Chamber.sol";
import {Evidence} from "./Evidence.sol";
import {Gaps} from "./Gaps.sol";
import {ICourt} from "./ICourt.sol";
import {IEscrow} from "./IEscrow.sol";
import {IFaults} from "./IFaults.sol";
import {IRegistry} from "./IRegistry.sol";
import {ITallyToken} from "./ITallyToken.sol";
import {Entry, SumNode} from "./SumTree.sol";
import {Commitment, JobRequest, Profile, Types, Verdict, WorkReceipt} from "./Types.sol";

/// @title Court, as promised in ICourt.
contract Court is ICourt {
    using SafeTransferLib for address;

    uint256 private constant BPS = 10_000;

    /// @dev Most members of a committee. Counting a round reads and sorts each seat; doubling it doubles that, and
    /// 15 of 21 honest votes need no larger one.
    uint256 private constant MAX_COMMITTEE = 31;

    /// @dev Rounds of a case at most.
    uint8 private constant ROUNDS = 3;

    /// @notice Seconds from an execution in which payers can claim their share. Doubling it leaves the unclaimed rest
    /// unburned twice as long.
    uint40 public constant COMPENSATION_WINDOW = 90 days;

    /// @dev Share of the stake lost where work was forged or improbable, and where it was withheld, in basis points.
    /// Withholding may be an outage: it costs more than an outage earns, and not everything.
    uint256 private constant FORGED_BPS = 10_000;
    uint256 private constant WITHHELD_BPS = 1_000;

    /// @dev Blocks back for which the EVM knows hashes.
    uint256 private constant KNOWN_BLOCKS = 256;

    struct Acceptance {
        uint32 flagPpm;
        uint40 since;
    }

    struct Record {
        uint128 tokens;
        uint128 missed;
    }

    IRegistry public immutable registry;
    IEscrow public immutable escrow;
    ITallyToken public immutable token;
    IFaults public immutable faults;
    Chamber public immutable chamber;

    uint32 private immutable _epochSeconds;
    uint32 private immutable _commitWindow;
    uint32 private immutable _submitWindow;
    uint32 private immutable _revealWindow;
    uint32 private immutable _answerWindow;
    uint8 private immutable _first;
    uint8 private immutable _second;
    uint8 private immutable _third;
    uint16 private immutable _forcedBps;
    uint96 private immutable _validatorPenalty;
    uint96 private immutable _appealBond;

    mapping(bytes32 profileId => Acceptance) private _profiles;
    mapping(address validator => Record) private _records;
    mapping(bytes32 key => Made) private _made;
    mapping(address provider => mapping(bytes32 profileId => bytes32 key)) private _newest;
    mapping(bytes32 caseId => Case) private _cases;
    mapping(bytes32 caseId => mapping(uint256 round => Seat[])) private _seats;
    mapping(bytes32 caseId => mapping(uint256 word => uint256 bits)) private _compensated;

    /// @param faults_ Judge of objective faults, which reads this contract's commitments.
    constructor(IRegistry registry_, IEscrow escrow_, ITallyToken token_, IFaults faults_, Rules memory r) {
        bool timeless = r.epochSeconds == 0 || r.commitWindow == 0 || r.submitWindow == 0 || r.revealWindow == 0;
        if (timeless || r.answerWindow == 0 || r.validatorStake == 0 || r.forcedBps > BPS) revert BadRules();
        if (r.committees[0] < 3 || r.committees[2] > MAX_COMMITTEE) revert BadRules();
        if (r.committees[1] < r.committees[0] || r.committees[2] < r.committees[1]) revert BadRules();
        uint256 round = uint256(r.submitWindow) + r.revealWindow + r.answerWindow;
        // As long again for the transactions between the windows, which somebody has to send and the chain to take.
        uint256 judgement = 2 * (uint256(r.epochSeconds) + r.commitWindow + ROUNDS * round);
        uint256 unbondDelay = registry_.unbondDelay();
        if (unbondDelay <= judgement) revert UnbondDelayTooShort(unbondDelay, judgement);
        registry = registry_;
        escrow = escrow_;
        token = token_;
        faults = faults_;
        chamber = new Chamber(registry_, r.validatorStake);
        _epochSeconds = r.epochSeconds;
        _commitWindow = r.commitWindow;
        _submitWindow = r.submitWindow;
        _revealWindow = r.revealWindow;
        _answerWindow = r.answerWindow;
        (_first, _second, _third) = (r.committees[0], r.committees[1], r.committees[2]);
        _forcedBps = r.forcedBps;
        _validatorPenalty = r.validatorPenalty;
        _appealBond = r.appealBond;
    }

    // ------------------------------------------------------------------------------------- profiles, validators

    /// @inheritdoc ICourt
    function registerProfile(Profile calldata) external returns (bytes32 profileId) {
        uint32 flagPpm;
        (profileId, flagPpm) = chamber.profileOf(msg.data[4:]);
        if (flagPpm == 0 || flagPpm > Evidence.MAX_FLAG_PPM) revert FlagRate(flagPpm);
        if (_profiles[profileId].flagPpm != 0) return profileId;
        _profiles[profileId] = Acceptance(flagPpm, uint40(block.timestamp));
        emit ProfileAccepted(profileId, flagPpm);
    }

    /// @inheritdoc ICourt
    function enlist() external {
        chamber.enlist(msg.sender);
        emit Enlisted(msg.sender);
    }

    /// @inheritdoc ICourt
    function retire() external {
        _remove(msg.sender, false);
    }

    /// @inheritdoc ICourt
    function expel(address validator) external {
        _remove(validator, true);
    }

    // ------------------------------------------------------------------------------------------- commit and draw

    /// @inheritdoc ICourt
    function commit(Commitment calldata c, bytes calldata signature) external returns (bytes32 key) {
        if (_profiles[c.profileId].flagPpm == 0) revert UnknownProfile(c.profileId);
        uint256 endsAt = (uint256(c.epoch) + 1) * _epochSeconds;
        if (block.timestamp < endsAt) revert EpochNotOver(endsAt, block.timestamp);
        if (c.count == 0 && (c.root != 0 || c.total != 0)) revert EmptyTree();
        key = keccak256(abi.encode(c.provider, c.profileId, c.epoch));
        if (_made[key].provider != address(0)) revert AlreadyCommitted(key);
        _requireProvider(c, signature);

        bytes32 previous = _newest[c.provider][c.profileId];
        Made storage before = _made[previous];
        uint64 earlier = before.earlier + before.count;
        // Whoever chose the order of its commitments could try lots until one forces, and so excuses, what it wants.
        if (previous == 0 || c.epoch > before.epoch) _newest[c.provider][c.profileId] = key;
        else previous = 0;
        _made[key] = Made({
            provider: c.provider,
            epoch: c.epoch,
            count: c.count,
            profileId: c.profileId,
            root: c.root,
            lot: c.lot,
            total: c.total,
            blockNumber: uint40(block.number),
            earlier: earlier,
            previous: previous,
            beacon: 0
        });
        emit Committed(key, c.provider, c.profileId, c.epoch, c.count, c.total);
    }

    /// @inheritdoc ICourt
    function draw(bytes32 key) external {
        Made storage made = _made[key];
        Case storage c = _cases[key];
        uint256 first = uint256(made.blockNumber) + 1;
        if (made.provider == address(0)) revert UnknownCommitment(key);
        if (c.state != CaseState.NONE) revert AlreadyDrawn(key);
        if (made.count == 0) revert NothingToJudge(key);
        if (block.number <= first) revert TooEarlyToDraw(first + 1, block.number);
        if (block.number > first + KNOWN_BLOCKS) first = block.number - 1;
        bytes32 beacon = keccak256(abi.encode(blockhash(first), key));

        made.beacon = beacon;
        c.flagPpm = _profiles[made.profileId].flagPpm;
        c.beaconBlock = uint40(first);
        (address[] memory members, uint256 eligible) = _committee(key, c, 0);
        if (members.length == 0) revert NotEnoughValidators(eligible);
        _open(key, c, 0, members);
        emit Drawn(key, beacon, members);
    }

    // ----------------------------------------------------------------------------------------- submit and reveal

    /// @inheritdoc ICourt
    function submit(bytes32 caseId, bytes32 digest) external {
        Case storage c = _known(caseId);
        (CaseState state, uint40 until) = _phase(c);
        _require(state == CaseState.SUBMIT, state, until);
        if (digest == 0) revert ZeroDigest();
        Seat storage seat = _seatOf(caseId, c, msg.sender);
        if (seat.status != SeatStatus.EMPTY) revert AlreadySubmitted(msg.sender);
        seat.status = SeatStatus.SUBMITTED;
        seat.word = digest;
        _countSubmitted(c);
        emit Submitted(caseId, msg.sender, c.round, digest);
    }

    /// @inheritdoc ICourt
    function reveal(Verdict calldata verdict) external {
        Case storage c = _known(verdict.caseId);
        (CaseState state, uint40 until) = _phase(c);
        _require(state == CaseState.REVEAL && block.timestamp < until, state, until);
        Seat storage seat = _seatOf(verdict.caseId, c, msg.sender);
        if (seat.status == SeatStatus.REVEALED || seat.status == SeatStatus.REMOVED) {
            revert AlreadyRevealed(msg.sender);
        }
        bool mine = verdict.validator == msg.sender && verdict.round == c.round;
        if (!mine || _digest(Types.hashVerdict(verdict)) != seat.word) revert NotWhatWasSubmitted(msg.sender);
        if (chamber.contradicts(verdict, c.flagPpm)) revert ContradictsItself(verdict.outcome);

        seat.status = SeatStatus.REVEALED;
        seat.outcome = Outcome(verdict.outcome);
        seat.tokens = verdict.tokens;
        seat.flags = verdict.flags;
        seat.voids = verdict.voids > type(uint16).max ? type(uint16).max : uint16(verdict.voids);
        seat.word = verdict.gaps;
        (c.state, c.until) = (state, until);
        ++c.revealed;
        emit Revealed(verdict.caseId, msg.sender, verdict);
    }

    /// @inheritdoc ICourt
    function disqualify(
        bytes32 caseId,
        Entry calldata entry,
        uint256,
        SumNode[] calldata,
        JobRequest calldata,
        bytes calldata,
        address member
    ) external {
        address client = chamber.buyerOf(msg.data[4:]);
        if (client == address(0)) revert NotInTheTree();
        _strike(caseId, client, member);
        emit Disqualified(caseId, member, entry.jobId);
    }

    // ---------------------------------------------------------------------------------------------------- conclude

    /// @inheritdoc ICourt
    function conclude(bytes32 caseId) external {
        Case storage c = _known(caseId);
        (CaseState state, uint40 until) = _phase(c);
        bool told = c.revealed == c.submitted;
        _require(state == CaseState.REVEAL && (told || block.timestamp >= until), state, until);
        _countMissed(_seats[caseId][c.round], caseId);
        (bool decided, Outcome found, Finding memory finding) = chamber.count(caseId, c.round);
        if (!decided || found == Outcome.VOID) {
            if (_escalate(caseId, c, found)) return;
            if (!decided) return _leaveUndecided(caseId, c);
        }
        _decide(caseId, c, found, finding);
    }

    /// @inheritdoc ICourt
    function execute(bytes32 caseId) external {
        Case storage c = _known(caseId);
        _require(c.state == CaseState.ANSWER && block.timestamp >= c.until, c.state, c.until);
        address provider = _made[caseId].provider;
        c.state = CaseState.CLOSED;
        c.until = uint40(block.timestamp) + COMPENSATION_WINDOW;
        if (c.outcome == Outcome.IMPROBABLE) chamber.forget(provider);
        address[] memory credited = _settleAgain(caseId, c);

        uint256 share = c.outcome == Outcome.WITHHELD ? WITHHELD_BPS : FORGED_BPS;
        (uint256 taken, uint256 bounty) = _slash(provider, share, caseId);
        uint256 each = credited.length == 0 ? 0 : bounty / 2 / credited.length;
        uint256 pool = _made[caseId].total == 0 ? 0 : bounty - bounty / 2;
        c.slashed = uint96(taken);
        c.pool = uint96(pool);
        uint256 bond = uint256(c.bonds) * _appealBond;
        c.bonds = 0;
        emit Executed(caseId, provider, c.outcome, taken);
        if (bond != 0) emit BondReleased(caseId, 0, bond);
        for (uint256 i; i < credited.length; ++i) {
            _pay(credited[i], each);
        }
        _burn(bounty - pool - each * credited.length + bond);
    }

    /// @inheritdoc ICourt
    function answer(bytes32 caseId, bytes32 secret) external {
        Case storage c = _accused(caseId);
        bytes32 previous = _made[caseId].previous;
        bool excused = chamber.excuses(caseId, c.round, c.flagPpm, previous, secret, _forcedBps);
        if (c.outcome != Outcome.IMPROBABLE || !excused) revert NotForced();

        c.state = CaseState.CLOSED;
        c.until = uint40(block.timestamp);
        c.wasForced = true;
        c.evidence = uint128(chamber.evidenceOf(_made[caseId].provider));
        _settleAgain(caseId, c);
        emit Answered(caseId, true);
        _returnBonds(caseId, c);
    }

    /// @inheritdoc ICourt
    function appeal(bytes32 caseId) external {
        Case storage c = _accused(caseId);
        if (c.round + 1 == ROUNDS) revert NoFurtherRound(c.round);
        (address[] memory members, uint256 eligible) = _committee(caseId, c, c.round + 1);
        if (members.length == 0) revert NotEnoughValidators(eligible);
        ++c.bonds;
        emit Appealed(caseId, c.round + 1);
        _open(caseId, c, c.round + 1, members);
        emit RoundOpened(caseId, c.round, members);
        address(token).safeTransferFrom(msg.sender, address(this), _appealBond);
    }

    // -------------------------------------------------------------------------------- objective faults, payers

    /// @inheritdoc ICourt
    function prove(uint8 kind, bytes calldata proof) external {
        (address accused, bytes32 faultId, uint16 shareBps, address payer, uint96 cap) = faults.judge(kind, proof);
        (uint256 taken, uint256 bounty) = _slash(accused, shareBps, faultId);
        uint256 reward = bounty / 2;
        uint256 back = payer == address(0) ? 0 : _min(bounty - reward, cap);
        emit FaultProven(faultId, accused, kind, msg.sender, taken);
        if (back != 0) emit Compensated(faultId, payer, 0, back);
        _pay(msg.sender, reward);
        if (back != 0) _pay(payer, back);
        _burn(bounty - reward - back);
    }

    /// @inheritdoc ICourt
    function compensate(
        bytes32 caseId,
        Entry calldata entry,
        uint256 index,
        SumNode[] calldata,
        WorkReceipt calldata receipt
    ) external {
        Case storage c = _known(caseId);
        if (c.pool == c.paid) revert NothingToPay();
        if (!chamber.inTree(msg.data[4:])) revert NotInTheTree();
        _markCompensated(caseId, index);
        address payer = _payerOf(caseId, receipt.client);
        if (payer == address(0)) revert NoPayer(receipt.client);
        uint256 shareDown = uint256(c.pool) * entry.amount / _made[caseId].total;
        uint256 amount = _min(_min(shareDown, entry.amount), c.pool - c.paid);
        c.paid += uint96(amount);
        emit Compensated(caseId, payer, index, amount);
        _pay(payer, amount);
    }

    /// @inheritdoc ICourt
    function burnRest(bytes32 caseId) external {
        Case storage c = _known(caseId);
        uint256 left = uint256(c.pool) - c.paid;
        if (left == 0) revert NothingToPay();
        _require(block.timestamp >= c.until, c.state, c.until);
        c.pool = c.paid;
        emit RestBurned(caseId, left);
        _burn(left);
    }

    // ------------------------------------------------------------------------------------------------------- views

    /// @inheritdoc ICourt
    function rules() external view returns (Rules memory) {
        return Rules({
            epochSeconds: _epochSeconds,
            commitWindow: _commitWindow,
            submitWindow: _submitWindow,
            revealWindow: _revealWindow,
            answerWindow: _answerWindow,
            committees: [_first, _second, _third],
            forcedBps: _forcedBps,
            validatorStake: uint96(chamber.validatorStake()),
            validatorPenalty: _validatorPenalty,
            appealBond: _appealBond
        });
    }

    /// @inheritdoc ICourt
    function commitments(bytes32 key) external view returns (Made memory) {
        return _made[key];
    }

    /// @inheritdoc ICourt
    function caseOf(bytes32 caseId) external view returns (Case memory c) {
        c = _cases[caseId];
        (c.state, c.until) = _phase(_cases[caseId]);
    }

    /// @inheritdoc ICourt
    function seatsOf(bytes32 caseId, uint8 round) external view returns (Seat[] memory) {
        return _seats[caseId][round];
    }

    /// @inheritdoc ICourt
    function validators() external view returns (address[] memory) {
        return chamber.validators();
    }

    /// @inheritdoc ICourt
    function evidenceOf(address provider) external view returns (uint256) {
        return chamber.evidenceOf(provider);
    }

    /// @inheritdoc ICourt
    function creditsOf(address validator) external view returns (uint128 tokens, uint128 missed) {
        Record storage record = _records[validator];
        return (record.tokens, record.missed);
    }

    /// @inheritdoc ICourt
    function profileFlagPpm(bytes32 profileId) external view returns (uint32) {
        return _profiles[profileId].flagPpm;
    }

    /// @inheritdoc ICourt
    function profileSince(bytes32 profileId) external view returns (uint40) {
        return _profiles[profileId].since;
    }

    // ------------------------------------------------------------------------------------------ inside: committees

    function _remove(address validator, bool isExpelled) private {
        chamber.remove(validator, isExpelled);
        emit Retired(validator);
    }

    /// @dev The members of a round; none when too few can judge.
    function _committee(bytes32 caseId, Case storage c, uint8 round)
        private
        view
        returns (address[] memory members, uint256 eligible)
    {
        Made storage made = _made[caseId];
        uint256 size = round == 0 ? _first : round == 1 ? _second : _third;
        address[] memory seated = _members(caseId, round);
        return chamber.drawn(made.beacon, round, made.provider, c.beaconBlock, seated, size);
    }

    /// @dev Members of the rounds before `end`.
    function _members(bytes32 caseId, uint256 end) private view returns (address[] memory members) {
        members = new address[](MAX_COMMITTEE * end);
        uint256 count;
        for (uint256 round; round < end; ++round) {
            Seat[] storage seats = _seats[caseId][round];
            for (uint256 i; i < seats.length; ++i) {
                members[count++] = seats[i].validator;
            }
        }
        assembly ("memory-safe") {
            mstore(members, count)
        }
    }

    function _open(bytes32 caseId, Case storage c, uint8 round, address[] memory members) private {
        c.state = CaseState.SUBMIT;
        c.round = round;
        c.until = uint40(block.timestamp) + _submitWindow;
        c.seats = uint8(members.length);
        c.submitted = 0;
        c.revealed = 0;
        Seat[] storage seats = _seats[caseId][round];
        for (uint256 i; i < members.length; ++i) {
            seats.push().validator = members[i];
        }
    }

    /// @dev State and end of its window as they are now: a submit window that is over became the reveal window.
    function _phase(Case storage c) private view returns (CaseState state, uint40 until) {
        (state, until) = (c.state, c.until);
        if (state == CaseState.SUBMIT && block.timestamp >= until) {
            (state, until) = (CaseState.REVEAL, until + _revealWindow);
        }
    }

    function _require(bool isItsTime, CaseState state, uint256 until) private pure {
        if (!isItsTime) revert WrongPhase(state, until);
    }

    function _known(bytes32 caseId) private view returns (Case storage c) {
        c = _cases[caseId];
        if (c.state == CaseState.NONE) revert UnknownCase(caseId);
    }

    /// @dev The case, in its answer window, called by its accused.
    function _accused(bytes32 caseId) private view returns (Case storage c) {
        c = _known(caseId);
        address provider = _made[caseId].provider;
        _require(c.state == CaseState.ANSWER && block.timestamp < c.until, c.state, c.until);
        if (msg.sender != provider) revert NotTheAccused(msg.sender, provider);
    }

    function _seatOf(bytes32 caseId, Case storage c, address validator) private view returns (Seat storage) {
        Seat[] storage seats = _seats[caseId][c.round];
        for (uint256 i; i < c.seats; ++i) {
            if (seats[i].validator == validator) return seats[i];
        }
        revert NotAMember(validator);
    }

    /// @dev Removes the vote of `member`, who has to own the channel that `client` spends from.
    function _strike(bytes32 caseId, address client, address member) private {
        Case storage c = _known(caseId);
        (CaseState state, uint40 until) = _phase(c);
        _require(state == CaseState.SUBMIT || state == CaseState.REVEAL, state, until);
        address payer = _payerOf(caseId, client);
        if (payer != member) revert NotItsOwnCase(member, payer);
        Seat storage seat = _seatOf(caseId, c, member);
        SeatStatus before = seat.status;
        if (before == SeatStatus.REMOVED) revert AlreadyRevealed(member);
        seat.status = SeatStatus.REMOVED;
        (c.state, c.until) = (state, until);
        if (before == SeatStatus.EMPTY) _countSubmitted(c);
        if (before != SeatStatus.REVEALED) ++c.revealed;
    }

    /// @dev One more seat has nothing to submit; after the last one reveals begin.
    function _countSubmitted(Case storage c) private {
        if (++c.submitted == c.seats && c.state == CaseState.SUBMIT) {
            c.state = CaseState.REVEAL;
            c.until = uint40(block.timestamp) + _revealWindow;
        }
    }

    // ------------------------------------------------------------------------------------------ inside: outcomes

    function _countMissed(Seat[] storage seats, bytes32 caseId) private {
        for (uint256 i; i < seats.length; ++i) {
            SeatStatus status = seats[i].status;
            if (status != SeatStatus.EMPTY && status != SeatStatus.SUBMITTED) continue;
            address validator = seats[i].validator;
            ++_records[validator].missed;
            emit Missed(caseId, validator);
        }
    }

    /// @dev Seats the next committee; false when there is none.
    function _escalate(bytes32 caseId, Case storage c, Outcome found) private returns (bool) {
        uint8 round = c.round;
        if (round + 1 == ROUNDS) return false;
        (address[] memory members,) = _committee(caseId, c, round + 1);
        if (members.length == 0) return false;
        emit Concluded(caseId, round, found, CaseState.SUBMIT, c.evidence);
        _open(caseId, c, round + 1, members);
        emit RoundOpened(caseId, round + 1, members);
        return true;
    }

    function _leaveUndecided(bytes32 caseId, Case storage c) private {
        c.state = CaseState.UNDECIDED;
        c.outcome = Outcome.PASS;
        c.until = uint40(block.timestamp);
        emit Concluded(caseId, c.round, Outcome.PASS, CaseState.UNDECIDED, c.evidence);
        _returnBonds(caseId, c);
    }

    /// @dev A quorum found `found`: what follows for the provider.
    function _decide(bytes32 caseId, Case storage c, Outcome found, Finding memory finding) private {
        address provider = _made[caseId].provider;
        (Outcome outcome, uint256 evidence) = chamber.sentence(provider, found, finding, c.flagPpm);
        bool guilty = outcome != Outcome.PASS && outcome != Outcome.VOID;
        CaseState state = guilty ? CaseState.ANSWER : CaseState.CLOSED;

        c.state = state;
        c.outcome = outcome;
        c.found = found;
        c.evidence = uint128(evidence);
        c.until = uint40(block.timestamp) + (guilty ? _answerWindow : 0);
        emit Concluded(caseId, c.round, outcome, state, evidence);
        if (guilty) return;
        _settle(caseId, c, finding);
        _returnBonds(caseId, c);
    }

    /// @dev Settles a case whose deciding round was counted before.
    function _settleAgain(bytes32 caseId, Case storage c) private returns (address[] memory) {
        (,, Finding memory finding) = chamber.count(caseId, c.round);
        return _settle(caseId, c, finding);
    }

    /// @dev Credits those who agreed and measured the same, and penalises those who claimed the opposite and did not.
    function _settle(bytes32 caseId, Case storage c, Finding memory finding)
        private
        returns (address[] memory credited)
    {
        uint256 tokens = finding.tokens == 0 ? 1 : finding.tokens;
        Seat[] storage seats = _seats[caseId][c.round];
        credited = new address[](seats.length);
        uint256 count;
        for (uint256 i; i < credited.length; ++i) {
            Seat storage seat = seats[i];
            bool agrees = seat.status == SeatStatus.REVEALED && seat.outcome == c.found;
            if (!agrees || !Gaps.matching(seat.word, finding.gaps)) continue;
            seat.status = SeatStatus.CREDITED;
            address validator = seat.validator;
            _records[validator].tokens += uint128(tokens);
            credited[count++] = validator;
            emit Credited(caseId, validator, tokens);
        }
        assembly ("memory-safe") {
            mstore(credited, count)
        }
        Outcome found = c.wasForced ? Outcome.IMPROBABLE : c.found;
        if (found == Outcome.PASS) _penalise(caseId, c.round, Outcome.IMPROBABLE, finding.gaps);
        if (found == Outcome.IMPROBABLE) _penalise(caseId, c.round, Outcome.PASS, finding.gaps);
    }

    /// @dev Takes the penalty from members of all rounds who voted `wrong` with gaps unlike `gaps`.
    function _penalise(bytes32 caseId, uint256 last, Outcome wrong, bytes32 gaps) private {
        for (uint256 round; round <= last; ++round) {
            Seat[] storage seats = _seats[caseId][round];
            for (uint256 i; i < seats.length; ++i) {
                Seat storage seat = seats[i];
                if (seat.status != SeatStatus.REVEALED || seat.outcome != wrong) continue;
                if (Gaps.matching(seat.word, gaps)) continue;
                address validator = seat.validator;
                bytes32 faultId = keccak256(abi.encode(caseId, round, validator));
                uint256 taken = registry.slash(validator, _validatorPenalty, faultId, address(0));
                emit Penalised(caseId, validator, taken);
            }
        }
    }

    /// @dev Takes a share of active and unbonding stake; the bounty on it comes here at once.
    function _slash(address wallet, uint256 shareBps, bytes32 faultId) private returns (uint256 taken, uint256 bounty) {
        (uint96 active, uint96 unbonding,) = registry.stakeOf(wallet);
        uint256 amount = (uint256(active) + unbonding) * shareBps / BPS;
        taken = registry.slash(wallet, amount, faultId, address(this));
        bounty = registry.collectBounty(address(this));
    }

    function _returnBonds(bytes32 caseId, Case storage c) private {
        uint256 bond = uint256(c.bonds) * _appealBond;
        if (bond == 0) return;
        c.bonds = 0;
        emit BondReleased(caseId, bond, 0);
        _pay(_made[caseId].provider, bond);
    }

    // ----------------------------------------------------------------------------------------- inside: documents

    function _digest(bytes32 structHash) private view returns (bytes32) {
        return Types.digest(Types.domainSeparator(block.chainid, address(escrow)), structHash);
    }

    function _requireProvider(Commitment calldata c, bytes calldata signature) private view {
        (address recovered,,) = ECDSA.tryRecover(_digest(Types.hashCommitment(c)), signature);
        bool theirs = recovered != address(0) && recovered == registry.nodeKeyOf(c.provider);
        if (!theirs) revert NotTheProviders(recovered, c.provider);
    }

    function _markCompensated(bytes32 caseId, uint256 index) private {
        uint256 bit = 1 << (index & 0xff);
        uint256 bits = _compensated[caseId][index >> 8];
        if (bits & bit != 0) revert AlreadyCompensated(index);
        _compensated[caseId][index >> 8] = bits | bit;
    }

    function _pay(address to, uint256 amount) private {
        address(token).safeTransfer(to, amount);
    }

    function _burn(uint256 amount) private {
        if (amount != 0) token.burn(amount);
    }

    function _payerOf(bytes32 caseId, address client) private view returns (address) {
        return escrow.ownerOf(_made[caseId].provider, client);
    }

    function _min(uint256 a, uint256 b) private pure returns (uint256) {
        return a < b ? a : b;
    }
}
