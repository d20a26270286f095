// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Escrow} from "../src/Escrow.sol";
import {ITallyToken} from "../src/ITallyToken.sol";
import {IEscrow} from "../src/IEscrow.sol";
import {SessionConsent, Types} from "../src/Types.sol";
import {EscrowFixture} from "./EscrowFixture.sol";
import {Vm, vm} from "./Vm.sol";

/// @notice Each function of Escrow: what it does, and what it refuses.
contract EscrowTest is EscrowFixture {
    address private constant OWNER = address(0xA11CE);
    address private constant PROVIDER = address(0xB0B);
    uint256 private constant SESSION = 0x5E55;
    uint256 private constant DEPOSIT = 1_000 ether;
    uint256 private constant ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;
    bytes32 private constant PERMIT_TYPEHASH =
        keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)");

    address private session = vm.addr(SESSION);

    function fund(address who, uint256 amount) private {
        require(token.transfer(who, amount));
        vm.prank(who);
        token.approve(address(escrow), amount);
    }

    function open() private {
        openChannel(OWNER, PROVIDER, SESSION, DEPOSIT);
    }

    function test_openMovesTheDeposit() external {
        fund(OWNER, DEPOSIT);
        bytes memory sig = consent(SESSION, OWNER, PROVIDER, 100);
        vm.expectEmit();
        emit IEscrow.ChannelOpened(PROVIDER, session, OWNER, DEPOSIT);
        vm.prank(OWNER);
        escrow.open(PROVIDER, session, DEPOSIT, 100, sig);
        IEscrow.Channel memory state = escrow.channel(PROVIDER, session);
        eq(state.deposit, DEPOSIT, "deposit");
        eq(state.claimed, 0, "claimed");
        eq(state.exitAt, 0, "exitAt");
        eq(escrow.ownerOf(PROVIDER, session), OWNER, "owner");
        eq(token.balanceOf(address(escrow)), DEPOSIT, "balance");
    }

    function test_openRefusesALateConsent() external {
        vm.warp(101);
        bytes memory sig = consent(SESSION, OWNER, PROVIDER, 100);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ConsentExpired.selector, 100, 101));
        vm.prank(OWNER);
        escrow.open(PROVIDER, session, DEPOSIT, 100, sig);
    }

    function test_openRefusesAConsentToSomebodyElse() external {
        bytes memory sig = consent(SESSION, OWNER, PROVIDER, 100);
        address thief = address(0xBAD);
        bytes32 digest =
            Types.digest(escrow.domainSeparator(), Types.hashSessionConsent(SessionConsent(thief, PROVIDER, 100)));
        address recovered = recover(digest, sig);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadConsent.selector, session, recovered));
        vm.prank(thief);
        escrow.open(PROVIDER, session, DEPOSIT, 100, sig);
    }

    function test_openRefusesTheZeroSignerWithAnEmptySignature() external {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ZeroParty.selector, PROVIDER, address(0)));
        vm.prank(OWNER);
        escrow.open(PROVIDER, address(0), DEPOSIT, 100, "");
    }

    function test_openRefusesTheMalleableTwin() external {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(
            SESSION,
            Types.digest(escrow.domainSeparator(), Types.hashSessionConsent(SessionConsent(OWNER, PROVIDER, 100)))
        );
        bytes memory twin = abi.encodePacked(r, bytes32(ORDER - uint256(s)), v == 27 ? 28 : 27);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.BadConsent.selector, session, address(0)));
        vm.prank(OWNER);
        escrow.open(PROVIDER, session, DEPOSIT, 100, twin);
    }

    function test_openRefusesATakenChannelAndAZeroAmount() external {
        open();
        bytes memory sig = consent(SESSION, OWNER, PROVIDER, 100);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ChannelTaken.selector, PROVIDER, session, OWNER));
        vm.prank(OWNER);
        escrow.open(PROVIDER, session, DEPOSIT, 100, sig);
        sig = consent(SESSION, OWNER, OWNER, 100);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ZeroAmount.selector));
        vm.prank(OWNER);
        escrow.open(OWNER, session, 0, 100, sig);
    }

    function test_openWithPermitNeedsNoApproval() external {
        (uint256 secret, address owner) = (0xA11CE, vm.addr(0xA11CE));
        require(token.transfer(owner, DEPOSIT));
        IEscrow.Permit memory permit = permitOf(secret, DEPOSIT);
        bytes memory sig = consent(SESSION, owner, PROVIDER, 100);
        vm.prank(owner);
        escrow.openWithPermit(PROVIDER, session, DEPOSIT, 100, sig, permit);
        eq(escrow.channel(PROVIDER, session).deposit, DEPOSIT, "deposit");
    }

    function test_openWithPermitSurvivesAFrontRunPermit() external {
        (uint256 secret, address owner) = (0xA11CE, vm.addr(0xA11CE));
        require(token.transfer(owner, DEPOSIT));
        IEscrow.Permit memory permit = permitOf(secret, DEPOSIT);
        token.permit(owner, address(escrow), DEPOSIT, permit.deadline, permit.v, permit.r, permit.s);
        bytes memory sig = consent(SESSION, owner, PROVIDER, 100);
        vm.prank(owner);
        escrow.openWithPermit(PROVIDER, session, DEPOSIT, 100, sig, permit);
        eq(escrow.channel(PROVIDER, session).deposit, DEPOSIT, "deposit");
    }

    function test_topUpIsTheOwnersAlone() external {
        open();
        fund(OWNER, 5);
        vm.expectEmit();
        emit IEscrow.ToppedUp(PROVIDER, session, 5, DEPOSIT + 5);
        vm.prank(OWNER);
        escrow.topUp(PROVIDER, session, 5);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotChannelOwner.selector, address(this), OWNER));
        escrow.topUp(PROVIDER, session, 5);
    }

    function test_depositStaysInUint96() external {
        open();
        uint256 room = type(uint96).max - DEPOSIT;
        vm.expectRevert(abi.encodeWithSelector(IEscrow.DepositTooLarge.selector, room + 1, room));
        vm.prank(OWNER);
        escrow.topUp(PROVIDER, session, room + 1);
    }

    function test_settlePaysTheRaiseOnceWhoeverSendsIt() external {
        open();
        bytes memory batch = bytes.concat(voucher(SESSION, PROVIDER, 100), voucher(SESSION, PROVIDER, 250));
        vm.prank(address(0xBAD));
        eq(escrow.settle(PROVIDER, batch), 250, "paid");
        eq(escrow.settle(PROVIDER, batch), 0, "paid again");
        eq(claimedOf(PROVIDER, SESSION), 250, "claimed");
        (uint256 earned,) = escrow.earnedOf(PROVIDER);
        (uint256 fees,) = escrow.fees();
        eq(earned, 220, "earned");
        eq(fees, 30, "fees");
    }

    function test_settleEmitsEachNewClaim() external {
        open();
        uint256[] memory claims = new uint256[](1);
        claims[0] = uint256(uint160(session)) << 96 | 100;
        bytes memory batch = voucher(SESSION, PROVIDER, 100);
        vm.expectEmit();
        emit IEscrow.Settled(PROVIDER, 100, 12, claims);
        escrow.settle(PROVIDER, batch);
    }

    function test_settlePaysNoMoreThanTheDepositAndTheRestAfterATopUp() external {
        open();
        bytes memory batch = voucher(SESSION, PROVIDER, uint96(DEPOSIT + 7));
        eq(escrow.settle(PROVIDER, batch), DEPOSIT, "paid");
        fund(OWNER, 10);
        vm.prank(OWNER);
        escrow.topUp(PROVIDER, session, 10);
        eq(escrow.settle(PROVIDER, batch), 7, "paid after top-up");
    }

    function testFuzz_feeIsRoundedDownOncePerBatch(uint96 amount) external {
        amount = uint96(bound(amount, 1, DEPOSIT));
        open();
        eq(escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, amount)), amount, "paid");
        (uint256 fees,) = escrow.fees();
        (uint256 earned,) = escrow.earnedOf(PROVIDER);
        eq(fees, uint256(amount) * 12 / 100, "fee");
        eq(earned + fees, amount, "nothing lost");
    }

    /// @dev EIP-2098 leaves s 255 bits, so almost no high s can be written; this key is made to have one. With the
    /// secret nonce 1, r is the generator's x and any s is valid for the key (s - digest) / r.
    function test_settleSkipsAHighS() external {
        uint96 cumulative = 100;
        bytes32 digest = voucherDigest(PROVIDER, cumulative);
        uint256 highS = ORDER / 2 + 1;
        uint256 r = 0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798;
        uint256 key = mulmod(addmod(highS, ORDER - uint256(digest) % ORDER, ORDER), inverse(r), ORDER);
        openChannel(OWNER, PROVIDER, key, DEPOSIT);
        eq(ecrecover(digest, 27, bytes32(r), bytes32(highS)), vm.addr(key), "the precompile accepts it");
        eq(escrow.settle(PROVIDER, abi.encodePacked(r, highS, cumulative)), 0, "paid for a high s");
        eq(
            escrow.settle(PROVIDER, abi.encodePacked(r, (ORDER - highS) | 1 << 255, cumulative)),
            100,
            "paid for its twin"
        );
    }

    function test_settleRefusesHalfAVoucher() external {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.MalformedBatch.selector, 75, 76));
        escrow.settle(PROVIDER, new bytes(75));
    }

    function test_settleOfNothingIsNothing() external {
        vm.recordLogs();
        eq(escrow.settle(PROVIDER, ""), 0, "paid");
        eq(vm.getRecordedLogs().length, 0, "events");
    }

    function test_aVoucherOfAnotherChainIsSkipped() external {
        open();
        bytes memory batch = voucher(SESSION, PROVIDER, 100);
        vm.chainId(999);
        eq(escrow.settle(PROVIDER, batch), 0, "paid on the fork");
        isTrue(escrow.domainSeparator() == Types.domainSeparator(999, address(escrow)), "separator");
        eq(escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 100)), 100, "signed for the fork");
    }

    function test_exitReturnsTheRestAndOldVouchersPayNothing() external {
        open();
        escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 100));
        requestExit();
        vm.warp(block.timestamp + EXIT_DELAY);
        vm.expectEmit();
        emit IEscrow.Exited(PROVIDER, session, DEPOSIT - 100);
        vm.prank(OWNER);
        eq(escrow.exit(PROVIDER, session), DEPOSIT - 100, "refund");
        eq(token.balanceOf(OWNER), DEPOSIT - 100, "owner's balance");
        eq(escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 500)), 0, "after exit");
        eq(claimedOf(PROVIDER, SESSION), 100, "claimed stays");
    }

    function test_vouchersSettleUntilTheExit() external {
        open();
        requestExit();
        vm.warp(block.timestamp + EXIT_DELAY);
        eq(escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 300)), 300, "paid");
        vm.prank(OWNER);
        eq(escrow.exit(PROVIDER, session), DEPOSIT - 300, "refund");
    }

    function test_aChannelComesBackAfterItsExit() external {
        open();
        escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 100));
        requestExit();
        vm.warp(block.timestamp + EXIT_DELAY);
        vm.prank(OWNER);
        escrow.exit(PROVIDER, session);
        fund(OWNER, 50);
        vm.prank(OWNER);
        escrow.topUp(PROVIDER, session, 50);
        eq(escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 120)), 20, "cumulative carries on");
    }

    function test_exitRefusesStrangersHasteAndSurprise() external {
        open();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NoExitRequested.selector));
        vm.prank(OWNER);
        escrow.exit(PROVIDER, session);
        requestExit();
        uint256 exitAt = block.timestamp + EXIT_DELAY;
        vm.warp(exitAt - 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ExitTooEarly.selector, exitAt, exitAt - 1));
        vm.prank(OWNER);
        escrow.exit(PROVIDER, session);
        vm.warp(exitAt);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotChannelOwner.selector, session, OWNER));
        vm.prank(session);
        escrow.exit(PROVIDER, session);
    }

    function test_onlyTheOwnerRequestsAndCancels() external {
        open();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotChannelOwner.selector, PROVIDER, OWNER));
        vm.prank(PROVIDER);
        escrow.requestExit(PROVIDER, session);
        requestExit();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotChannelOwner.selector, PROVIDER, OWNER));
        vm.prank(PROVIDER);
        escrow.cancelExit(PROVIDER, session);
        vm.prank(OWNER);
        escrow.cancelExit(PROVIDER, session);
        eq(escrow.channel(PROVIDER, session).exitAt, 0, "exitAt");
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NoExitRequested.selector));
        vm.prank(OWNER);
        escrow.cancelExit(PROVIDER, session);
    }

    function test_aPendingExitIsNotRestartedNorToppedUp() external {
        open();
        requestExit();
        uint256 exitAt = block.timestamp + EXIT_DELAY;
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ExitPending.selector, exitAt));
        vm.prank(OWNER);
        escrow.requestExit(PROVIDER, session);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ExitPending.selector, exitAt));
        vm.prank(OWNER);
        escrow.topUp(PROVIDER, session, 1);
    }

    function test_collectSendsToTheProviderWhoeverCalls() external {
        open();
        escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 1000));
        vm.prank(address(0xBAD));
        eq(escrow.collect(PROVIDER), 880, "sent");
        eq(escrow.collect(PROVIDER), 0, "sent again");
        eq(token.balanceOf(PROVIDER), 880, "provider's balance");
        (uint256 pending, uint256 collected) = escrow.earnedOf(PROVIDER);
        eq(pending, 0, "pending");
        eq(collected, 880, "collected");
    }

    function test_burnFeesDestroysThem() external {
        open();
        escrow.settle(PROVIDER, voucher(SESSION, PROVIDER, 1000));
        vm.prank(address(0xBAD));
        eq(escrow.burnFees(), 120, "burned");
        eq(escrow.burnFees(), 0, "burned again");
        eq(token.totalSupply(), SUPPLY - 120, "supply");
        (uint256 pending, uint256 burned) = escrow.fees();
        eq(pending, 0, "pending");
        eq(burned, 120, "burned so far");
    }

    function test_exitDelayIsBounded() external {
        uint256 most = escrow.MAX_EXIT_DELAY();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ExitDelayOutOfRange.selector, 0, most));
        new Escrow(ITallyToken(address(token)), 0);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.ExitDelayOutOfRange.selector, most + 1, most));
        new Escrow(ITallyToken(address(token)), most + 1);
    }

    /// @notice I6: exit touches no contract but the token, with everything else replaced by code that always fails.
    function test_I6_exitDependsOnNoContractButTheToken() external {
        open();
        requestExit();
        vm.warp(block.timestamp + EXIT_DELAY);
        vm.etch(PROVIDER, hex"fe");
        vm.etch(session, hex"fe");
        vm.startStateDiffRecording();
        vm.prank(OWNER);
        eq(escrow.exit(PROVIDER, session), DEPOSIT, "refund");
        Vm.AccountAccess[] memory accesses = vm.stopAndReturnStateDiff();
        isTrue(accesses.length >= 2, "the exit and the transfer were recorded");
        for (uint256 i = 0; i < accesses.length; i++) {
            address account = accesses[i].account;
            if (account == address(vm)) continue; // the test's own cheat code
            isTrue(account == address(escrow) || account == address(token), "only escrow and token");
        }
    }

    function requestExit() private {
        vm.prank(OWNER);
        escrow.requestExit(PROVIDER, session);
    }

    function permitOf(uint256 secret, uint256 amount) private view returns (IEscrow.Permit memory) {
        address owner = vm.addr(secret);
        bytes32 structHash =
            keccak256(abi.encode(PERMIT_TYPEHASH, owner, address(escrow), amount, token.nonces(owner), 100));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(secret, Types.digest(token.DOMAIN_SEPARATOR(), structHash));
        return IEscrow.Permit(100, v, r, s);
    }

    function recover(bytes32 digest, bytes memory sig) private pure returns (address) {
        (bytes32 r, bytes32 s, uint8 v) = (slice(sig, 0), slice(sig, 32), uint8(sig[64]));
        return ecrecover(digest, v, r, s);
    }

    /// @dev Fermat: x^(n-2) mod n.
    function inverse(uint256 x) private pure returns (uint256 out) {
        out = 1;
        for (uint256 e = ORDER - 2; e != 0; e >>= 1) {
            if (e & 1 == 1) out = mulmod(out, x, ORDER);
            x = mulmod(x, x, ORDER);
        }
    }

    function slice(bytes memory data, uint256 start) private pure returns (bytes32 out) {
        for (uint256 i = 0; i < 32; i++) {
            out |= bytes32(data[start + i]) >> (8 * i);
        }
    }
}
