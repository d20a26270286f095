// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {Bench, Finding} from "./Bench.sol";
import {EProcess, Evidence} from "./Evidence.sol";
import {ICourt} from "./ICourt.sol";
import {IRegistry} from "./IRegistry.sol";
import {Entry, SumNode, SumTree} from "./SumTree.sol";
import {JobRequest, Profile, Types, Verdict, WorkReceipt} from "./Types.sol";

/// @title Chamber: who can be drawn, the rules of a committee, and the evidence against each provider.
/// @notice The Court's other half: it creates it and alone changes it. What its functions revert with is in ICourt.
/// Rules as in incentives/committee.py, verdicts.py and evidence.py.
/// @dev A contract of its own because the Court's code would not fit EIP-170 with it.
contract Chamber {
    /// @notice Most enlisted validators. A draw reads the stake of each, some 5,000 gas, so a full house costs 2.7
    /// million; doubling it doubles that. Places cannot be held without stake (`expel`).
    uint256 public constant MAX_VALIDATORS = 512;

    /// @notice Fewest members of a committee. With two, one liar would decide or block every case.
    uint256 public constant LEAST_COMMITTEE = 3;

    uint256 private constant BPS = 10_000;

    /// @notice `caller` is not the Court.
    error NotCourt(address caller, address court);

    /// @dev `number`: place in `_enlisted`, from one. `since`: block of the enlistment.
    struct Place {
        uint16 number;
        uint40 since;
    }

    /// @notice Whose chamber it is: its creator.
    address public immutable court = msg.sender;

    /// @notice Where stake and node keys are read.
    IRegistry public immutable registry;

    /// @notice Active stake without which nobody is drawn, in wei.
    uint256 public immutable validatorStake;

    address[] private _enlisted;
    mapping(address validator => Place) private _places;
    mapping(address provider => EProcess) private _processes;

    modifier onlyCourt() {
        if (msg.sender != court) revert NotCourt(msg.sender, court);
        _;
    }

    constructor(IRegistry registry_, uint256 validatorStake_) {
        registry = registry_;
        validatorStake = validatorStake_;
    }

    // -------------------------------------------------------------------------------------------------- validators

    /// @notice ICourt.enlist for `validator`.
    function enlist(address validator) external onlyCourt {
        if (_places[validator].number != 0) revert ICourt.AlreadyEnlisted(validator);
        if (_enlisted.length == MAX_VALIDATORS) revert ICourt.TooManyValidators(MAX_VALIDATORS);
        if (registry.nodeKeyOf(validator) == address(0)) revert ICourt.NotRegistered(validator);
        uint256 active = _activeOf(validator);
        if (active < validatorStake) revert ICourt.StakeTooLow(active, validatorStake);
        _enlisted.push(validator);
        _places[validator] = Place(uint16(_enlisted.length), uint40(block.number));
    }

    /// @notice ICourt.retire for `validator`, or with `isExpelled` ICourt.expel.
    function remove(address validator, bool isExpelled) external onlyCourt {
        uint256 number = _places[validator].number;
        if (number == 0) revert ICourt.NotEnlisted(validator);
        if (isExpelled && _activeOf(validator) >= validatorStake) revert ICourt.StillStaked(validator);
        address last = _enlisted[_enlisted.length - 1];
        _enlisted[number - 1] = last;
        _places[last].number = uint16(number);
        delete _places[validator];
        _enlisted.pop();
    }

    /// @notice As ICourt.validators.
    function validators() external view returns (address[] memory) {
        return _enlisted;
    }

    /// @notice The members of a round, lowest rank first; none when fewer than LEAST_COMMITTEE can judge.
    /// @dev Of the eligible those not in `seated`, when at least `size` remain.
    /// @param provider The accused, who is never drawn.
    /// @param before Block in which, or after which, enlisting was too late.
    /// @return members At most `size`.
    /// @return eligible How many could judge.
    function drawn(
        bytes32 beacon,
        uint256 round,
        address provider,
        uint256 before,
        address[] calldata seated,
        uint256 size
    ) external view returns (address[] memory members, uint256 eligible) {
        address[] memory pool = _eligible(provider, before);
        eligible = pool.length;
        if (eligible >= LEAST_COMMITTEE) members = Bench.lowest(beacon, round, Bench.fresh(pool, seated, size), size);
    }

    // ------------------------------------------------------------------------------------------ rounds and evidence

    /// @notice The outcome that a quorum of a round agreed on, and what those who did measured. Of the caller's case.
    function count(bytes32 caseId, uint8 round)
        public
        view
        returns (bool decided, ICourt.Outcome found, Finding memory finding)
    {
        ICourt.Seat[] memory seats = ICourt(msg.sender).seatsOf(caseId, round);
        (decided, found) = Bench.agreed(seats);
        if (decided) finding = Bench.measured(seats, found);
    }

    /// @notice Whether a verdict's outcome is not what its own counts give, or its counts cannot be.
    function contradicts(Verdict calldata verdict, uint256 flagPpm) external pure returns (bool) {
        return Bench.contradicts(verdict, flagPpm);
    }

    /// @notice Id of a profile and the rate of flags it grants. `args`: arguments of ICourt.registerProfile.
    function profileOf(bytes calldata args) external pure returns (bytes32 profileId, uint32 flagPpm) {
        Profile memory profile = abi.decode(args, (Profile));
        return (Types.hashProfile(profile), profile.flagPpm);
    }

    /// @notice Whether an entry is at its index of the caller's commitment, and the receipt is the entry's.
    /// @param args Arguments of ICourt.compensate.
    function inTree(bytes calldata args) external view returns (bool) {
        (bytes32 key, Entry memory entry, uint256 index, SumNode[] memory siblings, WorkReceipt memory receipt) =
            abi.decode(args, (bytes32, Entry, uint256, SumNode[], WorkReceipt));
        if (_digest(Types.hashWorkReceipt(receipt)) != entry.receipt) return false;
        return _stands(ICourt(msg.sender).commitments(key), entry, index, siblings);
    }

    /// @notice The session key that signed the request of a job of the caller's commitment; zero when the entry is not
    /// at its index, or the request not the job's, or not signed by its client.
    /// @dev The client's own signature, and not the provider's word in a receipt: a provider could name any channel.
    /// @param args Arguments of ICourt.disqualify.
    function buyerOf(bytes calldata args) external view returns (address) {
        (
            bytes32 key,
            Entry memory entry,
            uint256 index,
            SumNode[] memory siblings,
            JobRequest memory request,
            bytes memory signature
        ) = abi.decode(args, (bytes32, Entry, uint256, SumNode[], JobRequest, bytes));
        ICourt.Made memory made = ICourt(msg.sender).commitments(key);
        bytes32 jobId = _digest(Types.hashJobRequest(request));
        if (jobId != entry.jobId || request.provider != made.provider) return address(0);
        if (!_stands(made, entry, index, siblings)) return address(0);
        (address signer,,) = ECDSA.tryRecover(jobId, signature);
        return signer == request.client ? signer : address(0);
    }

    /// @notice Whether the improbable tokens of the caller's case are an error that the commitment before it forced: the
    /// secret is of its lot, the draw says so, and the case shows no more flags than such an error explains.
    function excuses(bytes32 caseId, uint8 round, uint256 flagPpm, bytes32 previous, bytes32 secret, uint256 forcedBps)
        external
        view
        returns (bool)
    {
        ICourt.Made memory before = ICourt(msg.sender).commitments(previous);
        if (before.beacon == 0 || keccak256(abi.encode(secret)) != before.lot) return false;
        if (uint256(keccak256(abi.encode(secret, before.beacon))) % BPS >= forcedBps) return false;
        (,, Finding memory finding) = count(caseId, round);
        return finding.flags <= Bench.excused(finding, flagPpm);
    }

    /// @notice Evidence against a provider, in 1e-18: 1 before its first case.
    function evidenceOf(address provider) public view returns (uint256) {
        return Evidence.value(_processes[provider]);
    }

    /// @notice What follows for a provider from what a quorum found, and its evidence with this case. Only the Court.
    /// @dev The evidence is kept unless the provider is guilty: then it may still be cleared, and begins again when not.
    /// No bet is placed on what was seen of forged or withheld work: the provider chose it.
    function sentence(address provider, ICourt.Outcome found, Finding calldata finding, uint256 flagPpm)
        external
        onlyCourt
        returns (ICourt.Outcome outcome, uint256 evidence)
    {
        if (found == ICourt.Outcome.WITHHELD || found == ICourt.Outcome.FORGED) {
            return (found, evidenceOf(provider));
        }
        EProcess memory process =
            Evidence.update(_processes[provider], finding.tokens, finding.flags, finding.voids, flagPpm);
        evidence = Evidence.value(process);
        outcome = evidence >= Evidence.SLASH_AT ? ICourt.Outcome.IMPROBABLE : found;
        if (outcome != ICourt.Outcome.IMPROBABLE) _processes[provider] = process;
    }

    /// @notice Begin again with no evidence. Only the Court, when it slashes for improbable tokens.
    function forget(address provider) external onlyCourt {
        delete _processes[provider];
    }

    function _stands(ICourt.Made memory made, Entry memory entry, uint256 index, SumNode[] memory siblings)
        private
        pure
        returns (bool)
    {
        return SumTree.verify(entry, index, made.count, siblings, made.root, made.total);
    }

    function _digest(bytes32 structHash) private view returns (bytes32) {
        return Types.digest(registry.domainSeparator(), structHash);
    }

    function _activeOf(address wallet) private view returns (uint256 active) {
        (active,,) = registry.stakeOf(wallet);
    }

    /// @dev Who may judge `provider`: enlisted before that block, staked, and not the provider itself.
    function _eligible(address provider, uint256 before) private view returns (address[] memory pool) {
        pool = new address[](_enlisted.length);
        uint256 taken;
        for (uint256 i; i < pool.length; ++i) {
            address validator = _enlisted[i];
            if (validator == provider || _places[validator].since >= before) continue;
            if (_activeOf(validator) >= validatorStake) pool[taken++] = validator;
        }
        assembly ("memory-safe") {
            mstore(pool, taken)
        }
    }
}
