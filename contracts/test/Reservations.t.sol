// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IReservations} from "../src/IReservations.sol";
import {ITallyToken} from "../src/ITallyToken.sol";
import {Reservations} from "../src/Reservations.sol";
import {ReservationsFixture} from "./ReservationsFixture.sol";
import {Vm, vm} from "./Vm.sol";

/// @notice Each function of Reservations: what it does, and what it refuses.
contract ReservationsTest is ReservationsFixture {
    address private constant PROVIDER = address(0xB0B);
    address private constant BUYER = address(0xA11CE);
    address private constant OTHER = address(0xCA401);
    address private constant KEY = address(0x5E55);
    /// @dev 2 STE per second at 1,000 wei per STE: 7,200,000 wei an hour.
    uint64 private constant RATE = 2_000_000;
    uint96 private constant PRICE = 1_000;
    uint256 private constant HOUR_COST = 7_200_000;

    function setUp() public {
        vm.warp(1_000 * PERIOD);
        fund(BUYER, 1 ether);
        vm.prank(PROVIDER);
        reservations.offer(PROFILE, 5_000_000, PRICE, 2, 24);
    }

    function test_buyEscrowsTheWholePriceAndNamesTheKey() external {
        uint256 before = token.balanceOf(BUYER);
        bytes32 id = buy(RATE, period() + 1, 3);
        eq(before - token.balanceOf(BUYER), 3 * HOUR_COST, "cost");
        eq(token.balanceOf(address(reservations)), 3 * HOUR_COST, "escrowed");
        IReservations.Reservation memory right = reservations.reservation(id);
        eq(right.provider, PROVIDER, "provider");
        eq(right.profileId, PROFILE, "profileId");
        eq(right.holder, BUYER, "holder");
        eq(right.sessionKey, KEY, "sessionKey");
        eq(right.rate, RATE, "rate");
        eq(right.start, 1_001 * PERIOD, "start");
        eq(right.end, 1_004 * PERIOD, "end");
        eq(right.notice, 2, "notice");
        eq(right.perPeriod, HOUR_COST, "perPeriod");
        eq(right.claimed, 0, "claimed");
        for (uint256 p = 1_000; p < 1_006; p++) {
            eq(reservations.soldIn(PROVIDER, PROFILE, p), p > 1_000 && p < 1_004 ? RATE : 0, "soldIn");
        }
        eq(reservations.capacityOf(PROVIDER, PROFILE).bookedUntil, 1_004, "bookedUntil");
    }

    function test_idsDifferAndFollowFromBuyerAndCount() external {
        bytes32 first = buy(RATE, period(), 2);
        bytes32 second = buy(RATE, period(), 2);
        isTrue(first != second, "two purchases of the same are two rights");
    }

    function test_aCostIsRoundedUpPerPeriod() external {
        vm.prank(PROVIDER);
        reservations.offer(PROFILE, 5_000_000, 1, 1, 24);
        bytes32 id = buy(1, period(), 3);
        eq(reservations.reservation(id).perPeriod, 1, "3,600 micro-STE cost a wei");
        eq(token.balanceOf(address(reservations)), 3, "escrowed");
    }

    function test_soldOutInOnePeriodIsSoldOut() external {
        buy(4_000_000, period() + 2, 2);
        vm.expectRevert(abi.encodeWithSelector(IReservations.SoldOut.selector, 1_002, RATE, 1_000_000));
        tryBuy(RATE, period() + 1, 2, type(uint96).max);
        buy(RATE, period(), 2);
        buy(1_000_000, period() + 1, 3);
        eq(reservations.soldIn(PROVIDER, PROFILE, 1_002), 5_000_000, "full");
    }

    function test_buyRefusesWhatIsNotSold() external {
        vm.expectRevert(abi.encodeWithSelector(IReservations.ZeroRate.selector));
        tryBuy(0, period(), 2, type(uint96).max);
        vm.expectRevert(abi.encodeWithSelector(IReservations.TermNotSold.selector, 1, 2, 24));
        tryBuy(RATE, period(), 1, type(uint96).max);
        vm.expectRevert(abi.encodeWithSelector(IReservations.TermNotSold.selector, 0, 0, 0));
        vm.prank(BUYER);
        reservations.buy(BUYER, PROFILE, RATE, period(), 0, KEY, type(uint96).max); // who never offered
        vm.expectRevert(abi.encodeWithSelector(IReservations.TermNotSold.selector, 25, 2, 24));
        tryBuy(RATE, period(), 25, type(uint96).max);
        vm.expectRevert(abi.encodeWithSelector(IReservations.OutsideHorizon.selector, 999, 1_001, 1_000, 1_512));
        tryBuy(RATE, period() - 1, 2, type(uint96).max);
        vm.expectRevert(abi.encodeWithSelector(IReservations.OutsideHorizon.selector, 1_511, 1_513, 1_000, 1_512));
        tryBuy(RATE, period() + 511, 2, type(uint96).max);
        uint256 far = type(uint40).max;
        vm.expectRevert(abi.encodeWithSelector(IReservations.OutsideHorizon.selector, far, far + 2, 1_000, 1_512));
        tryBuy(RATE, type(uint40).max, 2, type(uint96).max);
        vm.expectRevert(abi.encodeWithSelector(IReservations.CostAbove.selector, 2 * HOUR_COST, 2 * HOUR_COST - 1));
        tryBuy(RATE, period(), 2, uint96(2 * HOUR_COST - 1));
        buy(RATE, period() + 510, 2);
    }

    function test_buyNeedsTheMoney() external {
        vm.prank(OTHER);
        vm.expectRevert(abi.encodeWithSelector(0x7939f424)); // solady's TransferFromFailed()
        reservations.buy(PROVIDER, PROFILE, RATE, 1_000, 2, KEY, type(uint96).max);
        eq(reservations.soldIn(PROVIDER, PROFILE, 1_000), 0, "nothing is sold");
    }

    function test_buyWithPermitNeedsNoApproval() external {
        uint256 secret = 0xA11CE5;
        address buyer = vm.addr(secret);
        require(token.transfer(buyer, 2 * HOUR_COST));
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"),
                buyer,
                address(reservations),
                2 * HOUR_COST,
                0,
                type(uint256).max
            )
        );
        (uint8 v, bytes32 r, bytes32 s) =
            vm.sign(secret, keccak256(abi.encodePacked(hex"1901", token.DOMAIN_SEPARATOR(), structHash)));
        IReservations.Permit memory permit = IReservations.Permit(type(uint256).max, v, r, s);
        uint96 cost = uint96(2 * HOUR_COST);
        vm.prank(buyer);
        bytes32 id = reservations.buyWithPermit(PROVIDER, PROFILE, RATE, 1_000, 2, KEY, cost, permit);
        eq(reservations.reservation(id).holder, buyer, "holder");
        eq(token.balanceOf(buyer), 0, "paid");
    }

    function test_aPriceChangeLeavesWhatWasSoldAlone() external {
        bytes32 id = buy(RATE, period(), 2);
        vm.prank(PROVIDER);
        reservations.offer(PROFILE, 5_000_000, 2 * PRICE, 3, 24);
        vm.warp(1_002 * PERIOD);
        eq(reservations.claimable(id), 2 * HOUR_COST, "claimable");
        eq(reservations.reservation(id).notice, 2, "notice");
    }

    function test_capacityFallsOnlyAsFarAsItIsUnsold() external {
        buy(RATE, period() + 300, 2);
        vm.prank(PROVIDER);
        vm.expectRevert(abi.encodeWithSelector(IReservations.SoldAlready.selector, 1_300, RATE, RATE - 1));
        reservations.offer(PROFILE, RATE - 1, PRICE, 2, 0);
        vm.prank(PROVIDER);
        reservations.offer(PROFILE, RATE, PRICE, 2, 0);
        vm.expectRevert(abi.encodeWithSelector(IReservations.TermNotSold.selector, 2, 2, 0));
        tryBuy(RATE, period(), 2, type(uint96).max);
        vm.warp(1_302 * PERIOD);
        vm.prank(PROVIDER);
        reservations.offer(PROFILE, 0, PRICE, 2, 24);
        vm.expectRevert(abi.encodeWithSelector(IReservations.SoldOut.selector, 1_302, RATE, 0));
        tryBuy(RATE, period(), 2, type(uint96).max);
    }

    function test_termsLieWithinTheHorizon() external {
        vm.expectRevert(abi.encodeWithSelector(IReservations.TermsOutOfRange.selector, 0, 24, 512));
        reservations.offer(PROFILE, 1, PRICE, 0, 24);
        vm.expectRevert(abi.encodeWithSelector(IReservations.TermsOutOfRange.selector, 1, 513, 512));
        reservations.offer(PROFILE, 1, PRICE, 1, 513);
        vm.expectRevert(abi.encodeWithSelector(IReservations.TermsOutOfRange.selector, 3, 2, 512));
        reservations.offer(PROFILE, 1, PRICE, 3, 2);
    }

    function test_periodLengthIsBounded() external {
        ITallyToken money = ITallyToken(address(token));
        vm.expectRevert(abi.encodeWithSelector(IReservations.PeriodOutOfRange.selector, 0, 30 days));
        new Reservations(money, 0);
        vm.expectRevert(abi.encodeWithSelector(IReservations.PeriodOutOfRange.selector, 30 days + 1, 30 days));
        new Reservations(money, 30 days + 1);
    }

    function test_claimPaysProRataAndBurnsTheFee() external {
        bytes32[] memory ids = new bytes32[](2);
        ids[0] = ids[1] = buy(RATE, period() + 1, 2);
        eq(reservations.claim(PROVIDER, ids), 0, "before the start");
        vm.warp(1_001 * PERIOD + PERIOD / 4);
        uint256 supply = token.totalSupply();
        uint256 fee = HOUR_COST / 4 * 12 / 100;
        vm.expectEmit();
        emit IReservations.Claimed(PROVIDER, HOUR_COST / 4, fee);
        vm.prank(OTHER);
        eq(reservations.claim(PROVIDER, ids), HOUR_COST / 4, "a quarter of an hour, once");
        eq(token.balanceOf(PROVIDER), HOUR_COST / 4 - fee, "provider's");
        eq(supply - token.totalSupply(), fee, "burned");
        eq(reservations.claim(PROVIDER, ids), 0, "again");
        eq(reservations.claim(OTHER, ids), 0, "another's rights");
        vm.warp(2_000 * PERIOD);
        eq(reservations.claim(PROVIDER, ids), 2 * HOUR_COST - HOUR_COST / 4, "the rest");
        eq(token.balanceOf(address(reservations)), 0, "nothing is left over");
    }

    function test_releaseReturnsTheUnearnedRestAtOnce() external {
        bytes32 id = buy(RATE, period(), 4);
        vm.warp(1_001 * PERIOD + PERIOD / 2);
        vm.prank(BUYER);
        vm.expectRevert(abi.encodeWithSelector(IReservations.NotProvider.selector, BUYER, PROVIDER));
        reservations.release(id);
        uint256 before = token.balanceOf(BUYER);
        vm.prank(PROVIDER);
        eq(reservations.release(id), 4 * HOUR_COST - HOUR_COST * 3 / 2, "refund");
        eq(token.balanceOf(BUYER) - before, 4 * HOUR_COST - HOUR_COST * 3 / 2, "to the holder");
        eq(reservations.reservation(id).end, 1_001 * PERIOD + PERIOD / 2, "end");
        eq(reservations.soldIn(PROVIDER, PROFILE, 1_001), RATE, "the running period stays sold");
        eq(reservations.soldIn(PROVIDER, PROFILE, 1_002), 0, "later ones are free");
        eq(reservations.claimable(id), HOUR_COST * 3 / 2, "claimable");
        uint256 end = reservations.reservation(id).end;
        vm.prank(PROVIDER);
        vm.expectRevert(abi.encodeWithSelector(IReservations.EndsAnyway.selector, end, end));
        reservations.release(id);
    }

    function test_releaseBeforeTheStartReturnsAll() external {
        bytes32 id = buy(RATE, period() + 1, 4);
        vm.prank(PROVIDER);
        eq(reservations.release(id), 4 * HOUR_COST, "refund");
        vm.warp(1_010 * PERIOD);
        eq(reservations.claimable(id), 0, "claimable");
        eq(reservations.soldIn(PROVIDER, PROFILE, 1_001), 0, "free");
    }

    function test_quitEndsAfterTheNotice() external {
        bytes32 id = buy(RATE, period(), 10);
        vm.warp(1_003 * PERIOD + 1);
        vm.prank(OTHER);
        vm.expectRevert(abi.encodeWithSelector(IReservations.NotHolder.selector, OTHER, BUYER));
        reservations.quit(id);
        vm.expectEmit();
        emit IReservations.Shortened(id, BUYER, BUYER, 1_006 * PERIOD, 4 * HOUR_COST);
        vm.prank(BUYER);
        eq(reservations.quit(id), 4 * HOUR_COST, "refund");
        eq(reservations.soldIn(PROVIDER, PROFILE, 1_005), RATE, "still sold");
        eq(reservations.soldIn(PROVIDER, PROFILE, 1_006), 0, "free");
        vm.prank(BUYER);
        vm.expectRevert(abi.encodeWithSelector(IReservations.EndsAnyway.selector, 1_006 * PERIOD, 1_006 * PERIOD));
        reservations.quit(id);
        vm.warp(1_020 * PERIOD);
        eq(reservations.claimable(id), 6 * HOUR_COST, "claimable");
    }

    function test_quitBeforeTheStartCostsTheNotice() external {
        bytes32 id = buy(RATE, period() + 20, 10);
        vm.prank(BUYER);
        eq(reservations.quit(id), 8 * HOUR_COST, "refund");
        eq(reservations.reservation(id).end, 1_022 * PERIOD, "end");
    }

    function test_transferMovesTheRightAndClearsItsKey() external {
        bytes32 id = buy(RATE, period(), 10);
        vm.prank(BUYER);
        vm.expectRevert(abi.encodeWithSelector(IReservations.ZeroHolder.selector));
        reservations.transfer(id, address(0));
        vm.expectRevert(abi.encodeWithSelector(IReservations.NotHolder.selector, address(this), BUYER));
        reservations.transfer(id, OTHER);
        vm.prank(BUYER);
        reservations.transfer(id, OTHER);
        eq(reservations.reservation(id).sessionKey, address(0), "cleared");
        vm.prank(BUYER);
        vm.expectRevert(abi.encodeWithSelector(IReservations.NotHolder.selector, BUYER, OTHER));
        reservations.assign(id, KEY);
        vm.prank(OTHER);
        reservations.assign(id, KEY);
        eq(reservations.reservation(id).sessionKey, KEY, "assigned");
        vm.prank(OTHER);
        eq(reservations.quit(id), 7 * HOUR_COST, "refund");
        eq(token.balanceOf(OTHER), 7 * HOUR_COST, "to the new holder");
    }

    function test_nobodyHoldsWhatDoesNotExist() external {
        vm.expectRevert(abi.encodeWithSelector(IReservations.NotHolder.selector, address(this), address(0)));
        reservations.quit(bytes32(0));
        vm.expectRevert(abi.encodeWithSelector(IReservations.NotProvider.selector, address(this), address(0)));
        reservations.release(bytes32(0));
        bytes32[] memory ids = new bytes32[](1);
        eq(reservations.claim(address(0), ids), 0, "claim");
    }

    /// @notice Refunds and payments touch no contract but the token.
    function test_releaseDependsOnNothingButTheToken() external {
        bytes32 id = buy(RATE, period(), 4);
        vm.startStateDiffRecording();
        vm.prank(PROVIDER);
        reservations.release(id);
        Vm.AccountAccess[] memory accesses = vm.stopAndReturnStateDiff();
        for (uint256 i = 0; i < accesses.length; i++) {
            address account = accesses[i].account;
            bool known = account == address(reservations) || account == address(token) || account == address(vm);
            isTrue(known, "another contract was touched");
        }
    }

    function buy(uint64 rate, uint40 first, uint16 periods) private returns (bytes32) {
        return tryBuy(rate, first, periods, type(uint96).max);
    }

    function tryBuy(uint64 rate, uint40 first, uint16 periods, uint96 maxCost) private returns (bytes32) {
        vm.prank(BUYER);
        return reservations.buy(PROVIDER, PROFILE, rate, first, periods, KEY, maxCost);
    }
}
