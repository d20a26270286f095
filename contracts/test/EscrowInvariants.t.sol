// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Escrow} from "../src/Escrow.sol";
import {IEscrow} from "../src/IEscrow.sol";
import {SessionConsent, Types, Voucher} from "../src/Types.sol";
import {TallyToken} from "../src/TallyToken.sol";
import {EscrowFixture} from "./EscrowFixture.sol";
import {Checks, Vm, vm} from "./Vm.sol";

/// @notice Lawful users of one escrow: two owners, three session keys, two providers, in any order forge likes.
/// @dev Every action is valid for the state it meets (fail_on_revert), or does nothing.
contract EscrowHandler is Checks {
    uint256 public constant PROVIDERS = 2;
    uint256 public constant SIGNERS = 3;
    uint256 private constant OWNERS = 2;
    uint256 private constant ITEMS = 5;

    Escrow private immutable _escrow;
    TallyToken private immutable _token;

    /// @notice Highest claimed seen, and highest cumulative ever signed, per channel.
    mapping(address provider => mapping(address signer => uint256)) public seenClaimed;
    mapping(address provider => mapping(address signer => uint256)) public highestSigned;
    /// @notice Tokens sent to the escrow past its functions.
    uint256 public donated;

    bytes private _lastBatch;
    address private _lastProvider;
    /// @dev Derived once: deriving an address from its secret is most of a run's time.
    address[SIGNERS] private _signers;

    constructor(Escrow escrow, TallyToken token) {
        _escrow = escrow;
        _token = token;
        for (uint256 i = 0; i < SIGNERS; i++) {
            _signers[i] = vm.addr(secret(i));
        }
        for (uint256 i = 0; i < OWNERS; i++) {
            vm.prank(owner(i));
            token.approve(address(escrow), type(uint256).max);
        }
    }

    function provider(uint256 i) public pure returns (address) {
        return address(uint160(0xB0B00 + i % PROVIDERS));
    }

    function signer(uint256 i) public view returns (address) {
        return _signers[i % SIGNERS];
    }

    function owner(uint256 i) public pure returns (address) {
        return address(uint160(0xA11CE00 + i % OWNERS));
    }

    function open(uint256 p, uint256 s, uint256 o, uint256 amount) external checked {
        if (_escrow.ownerOf(provider(p), signer(s)) != address(0)) return;
        amount = affordable(owner(o), amount);
        if (amount == 0) return;
        bytes32 hash = Types.hashSessionConsent(SessionConsent(owner(o), provider(p), type(uint64).max));
        bytes memory sig = signature(secret(s), Types.digest(_escrow.domainSeparator(), hash));
        vm.prank(owner(o));
        _escrow.open(provider(p), signer(s), amount, type(uint64).max, sig);
    }

    function topUp(uint256 p, uint256 s, uint256 amount) external checked {
        address who = _escrow.ownerOf(provider(p), signer(s));
        amount = affordable(who, amount);
        if (who == address(0) || amount == 0 || _escrow.channel(provider(p), signer(s)).exitAt != 0) return;
        vm.prank(who);
        _escrow.topUp(provider(p), signer(s), amount);
    }

    /// @dev Vouchers of any of the keys, with or without a channel, stale, above the deposit or forged.
    function settle(uint256 p, uint256[ITEMS] calldata seeds) external checked {
        bytes memory batch;
        for (uint256 i = 0; i < ITEMS; i++) {
            uint256 s = seeds[i] >> 8;
            uint96 cumulative = uint96((seeds[i] >> 32) % 2_000);
            bytes32 hash = Types.hashVoucher(Voucher(provider(p), cumulative));
            bytes32 digest = Types.digest(_escrow.domainSeparator(), hash);
            bool forged = seeds[i] % 8 == 0;
            if (!forged && cumulative > highestSigned[provider(p)][signer(s)]) {
                highestSigned[provider(p)][signer(s)] = cumulative;
            }
            batch = bytes.concat(batch, packedVoucher(forged ? 0xBAD : secret(s), digest, cumulative));
        }
        _escrow.settle(provider(p), batch);
        (_lastBatch, _lastProvider) = (batch, provider(p));
        eq(_escrow.settle(provider(p), batch), 0, "I3: a batch pays once");
    }

    /// @dev An old batch may be paid again only as far as a top-up has funded it since.
    function replay() external checked {
        _escrow.settle(_lastProvider, _lastBatch);
    }

    function requestExit(uint256 p, uint256 s) external checked {
        address who = _escrow.ownerOf(provider(p), signer(s));
        if (who == address(0) || _escrow.channel(provider(p), signer(s)).exitAt != 0) return;
        vm.prank(who);
        _escrow.requestExit(provider(p), signer(s));
    }

    function cancelExit(uint256 p, uint256 s) external checked {
        if (_escrow.channel(provider(p), signer(s)).exitAt == 0) return;
        vm.prank(_escrow.ownerOf(provider(p), signer(s)));
        _escrow.cancelExit(provider(p), signer(s));
    }

    /// @dev I6 in every state reached: the exit succeeds and touches nothing but the escrow and the token.
    function exit(uint256 p, uint256 s) external checked {
        IEscrow.Channel memory state = _escrow.channel(provider(p), signer(s));
        if (state.exitAt == 0) return;
        if (block.timestamp < state.exitAt) vm.warp(state.exitAt);
        address who = _escrow.ownerOf(provider(p), signer(s));
        address key = signer(s);
        vm.startStateDiffRecording();
        vm.prank(who);
        uint256 refund = _escrow.exit(provider(p), key);
        Vm.AccountAccess[] memory accesses = vm.stopAndReturnStateDiff();
        eq(refund, state.deposit - state.claimed, "refund");
        for (uint256 i = 0; i < accesses.length; i++) {
            address account = accesses[i].account;
            bool known = account == address(_escrow) || account == address(_token) || account == address(vm);
            isTrue(known, "I6: exit depends on no contract but the token");
        }
    }

    function collect(uint256 p) external checked {
        _escrow.collect(provider(p));
    }

    function burnFees() external checked {
        _escrow.burnFees();
    }

    function donate(uint256 o, uint256 amount) external checked {
        amount = affordable(owner(o), amount);
        vm.prank(owner(o));
        require(_token.transfer(address(_escrow), amount));
        donated += amount;
    }

    /// @dev I2, the part that needs a memory: claimed never falls.
    modifier checked() {
        _;
        for (uint256 p = 0; p < PROVIDERS; p++) {
            for (uint256 s = 0; s < SIGNERS; s++) {
                uint256 claimed = _escrow.channel(provider(p), signer(s)).claimed;
                isTrue(claimed >= seenClaimed[provider(p)][signer(s)], "I2: claimed is monotone");
                seenClaimed[provider(p)][signer(s)] = claimed;
            }
        }
    }

    function secret(uint256 i) private pure returns (uint256) {
        return 0x5E55 + i % SIGNERS;
    }

    function affordable(address who, uint256 amount) private view returns (uint256) {
        uint256 balance = _token.balanceOf(who);
        return bound(amount, 0, balance < 1_000 ? balance : 1_000);
    }
}

/// @notice I1, I2, I3 and I6, after any sequence of the handler's actions.
contract EscrowInvariantsTest is EscrowFixture {
    EscrowHandler private handler;

    function setUp() public {
        handler = new EscrowHandler(escrow, token);
        require(token.transfer(handler.owner(0), 100_000));
        require(token.transfer(handler.owner(1), 100_000));
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        bytes4[] memory selectors = new bytes4[](10);
        selectors[0] = EscrowHandler.open.selector;
        selectors[1] = EscrowHandler.topUp.selector;
        selectors[2] = EscrowHandler.settle.selector;
        selectors[3] = EscrowHandler.replay.selector;
        selectors[4] = EscrowHandler.requestExit.selector;
        selectors[5] = EscrowHandler.cancelExit.selector;
        selectors[6] = EscrowHandler.exit.selector;
        selectors[7] = EscrowHandler.collect.selector;
        selectors[8] = EscrowHandler.burnFees.selector;
        selectors[9] = EscrowHandler.donate.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), selectors);
    }

    /// @notice I1: balance >= sum(deposit - claimed) + earned + fees; here exactly, donations aside.
    function invariant_I1_solvent() external view {
        (uint256 owed,) = escrow.fees();
        for (uint256 p = 0; p < handler.PROVIDERS(); p++) {
            (uint256 earned,) = escrow.earnedOf(handler.provider(p));
            owed += earned;
            for (uint256 s = 0; s < handler.SIGNERS(); s++) {
                IEscrow.Channel memory state = escrow.channel(handler.provider(p), handler.signer(s));
                owed += state.deposit - state.claimed;
            }
        }
        eq(token.balanceOf(address(escrow)), owed + handler.donated(), "I1: balance");
    }

    /// @notice I2: claimed <= deposit (the handler checks that claimed is monotone).
    /// I3: no voucher pays twice, so a channel's claimed never passes the highest cumulative its key signed, and what
    /// was paid out in all is what was claimed in all.
    function invariant_I2_I3_claimsAreCovered() external view {
        (uint256 paidOut, uint256 burned) = escrow.fees();
        paidOut += burned;
        uint256 claimed = 0;
        for (uint256 p = 0; p < handler.PROVIDERS(); p++) {
            address provider = handler.provider(p);
            (uint256 pending, uint256 collected) = escrow.earnedOf(provider);
            paidOut += pending + collected;
            for (uint256 s = 0; s < handler.SIGNERS(); s++) {
                IEscrow.Channel memory state = escrow.channel(provider, handler.signer(s));
                isTrue(state.claimed <= state.deposit, "I2: claimed <= deposit");
                isTrue(state.claimed <= handler.highestSigned(provider, handler.signer(s)), "I3: paid at most once");
                claimed += state.claimed;
            }
        }
        eq(paidOut, claimed, "I3: paid out is claimed");
    }
}
