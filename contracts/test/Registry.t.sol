// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IRegistry} from "../src/IRegistry.sol";
import {Tariff} from "../src/Types.sol";
import {RegistryFixture} from "./RegistryFixture.sol";
import {vm} from "./Vm.sol";

/// @notice Each function of Registry: what it does, and what it refuses.
contract RegistryTest is RegistryFixture {
    address private constant WALLET = address(0xA11CE);
    address private constant OTHER = address(0xB0B);
    address private constant REPORTER = address(0x4E9);
    uint256 private constant KEY = 0x4E4;
    uint256 private constant NEXT_KEY = 0x4E5;
    bytes32 private constant PROFILE = keccak256("profile");
    bytes32 private constant FAULT = keccak256("fault");

    address private nodeKey = vm.addr(KEY);

    function test_registerBindsAKeyThatAgrees() external {
        vm.warp(50);
        bytes memory sig = keyConsent(KEY, WALLET, 100);
        vm.expectEmit();
        emit IRegistry.NodeKeySet(WALLET, nodeKey);
        vm.prank(WALLET);
        registry.register(nodeKey, 100, sig);
        eq(registry.nodeKeyOf(WALLET), nodeKey, "nodeKeyOf");
        (address wallet, uint40 since, uint40 until) = registry.walletOf(nodeKey);
        eq(wallet, WALLET, "walletOf");
        eq(since, 50, "since");
        eq(until, 0, "until");
    }

    function test_registerRefusesAKeyThatDidNotAgree() external {
        bytes memory sig = keyConsent(NEXT_KEY, WALLET, 100);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.BadSignature.selector, nodeKey, vm.addr(NEXT_KEY)));
        vm.prank(WALLET);
        registry.register(nodeKey, 100, sig);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.ZeroNodeKey.selector));
        vm.prank(WALLET);
        registry.register(address(0), 100, "");
        sig = keyConsent(KEY, WALLET, 100);
        vm.warp(101);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.ConsentExpired.selector, 100, 101));
        vm.prank(WALLET);
        registry.register(nodeKey, 100, sig);
    }

    function test_aKeyServesOneWalletOnce() external {
        register(WALLET, KEY);
        bytes memory sig = keyConsent(KEY, OTHER, 100);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.NodeKeyTaken.selector, nodeKey, WALLET));
        vm.prank(OTHER);
        registry.register(nodeKey, 100, sig);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.AlreadyRegistered.selector, WALLET, nodeKey));
        vm.prank(WALLET);
        registry.register(nodeKey, 100, "");
    }

    function test_aFormerKeyStaysAttributable() external {
        vm.warp(50);
        register(WALLET, KEY);
        vm.warp(80);
        bytes memory sig = keyConsent(NEXT_KEY, WALLET, 100);
        vm.expectEmit();
        emit IRegistry.NodeKeyRetired(WALLET, nodeKey);
        vm.prank(WALLET);
        registry.rotateNodeKey(vm.addr(NEXT_KEY), 100, sig);
        eq(registry.nodeKeyOf(WALLET), vm.addr(NEXT_KEY), "nodeKeyOf");
        (address wallet, uint40 since, uint40 until) = registry.walletOf(nodeKey);
        eq(wallet, WALLET, "walletOf");
        eq(since, 50, "since");
        eq(until, 80, "until");
        sig = keyConsent(KEY, WALLET, 100);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.NodeKeyTaken.selector, nodeKey, WALLET));
        vm.prank(WALLET);
        registry.rotateNodeKey(nodeKey, 100, sig);
    }

    function test_rotateNeedsAKeyToRotate() external {
        vm.expectRevert(abi.encodeWithSelector(IRegistry.NotRegistered.selector, WALLET));
        vm.prank(WALLET);
        registry.rotateNodeKey(nodeKey, 100, "");
    }

    function test_stakeReachesTheMinimum() external {
        require(token.transfer(WALLET, MIN_STAKE));
        vm.prank(WALLET);
        token.approve(address(registry), MIN_STAKE);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.StakeBelowMinimum.selector, MIN_STAKE - 1, MIN_STAKE));
        vm.prank(WALLET);
        registry.stake(MIN_STAKE - 1);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.ZeroAmount.selector));
        vm.prank(WALLET);
        registry.stake(0);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.StakeTooLarge.selector, uint256(1) << 96, type(uint96).max));
        vm.prank(WALLET);
        registry.stake(1 << 96);
        vm.expectEmit();
        emit IRegistry.Staked(WALLET, MIN_STAKE, MIN_STAKE);
        vm.prank(WALLET);
        registry.stake(MIN_STAKE);
        checkStake(MIN_STAKE, 0, 0);
    }

    function test_unbondWaitsAndWithdraws() external {
        stake(WALLET, 3_000);
        uint256 releaseAt = block.timestamp + UNBOND_DELAY;
        vm.prank(WALLET);
        registry.requestUnbond(2_000);
        checkStake(1_000, 2_000, releaseAt);
        vm.warp(releaseAt - 1);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.StillBonded.selector, releaseAt, releaseAt - 1));
        vm.prank(WALLET);
        registry.withdraw();
        vm.warp(releaseAt);
        vm.prank(WALLET);
        eq(registry.withdraw(), 2_000, "withdrawn");
        eq(token.balanceOf(WALLET), 2_000, "balance");
        checkStake(1_000, 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.NothingUnbonding.selector, WALLET));
        vm.prank(WALLET);
        registry.withdraw();
    }

    function test_aSecondRequestRestartsTheDelay() external {
        stake(WALLET, 3_000);
        vm.prank(WALLET);
        registry.requestUnbond(1_000);
        vm.warp(block.timestamp + UNBOND_DELAY);
        vm.prank(WALLET);
        registry.requestUnbond(1_000);
        checkStake(1_000, 2_000, block.timestamp + UNBOND_DELAY);
    }

    function test_unbondLeavesNothingOrTheMinimum() external {
        stake(WALLET, 1_500);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.StakeBelowMinimum.selector, 999, MIN_STAKE));
        vm.prank(WALLET);
        registry.requestUnbond(501);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.InsufficientStake.selector, 1_501, 1_500));
        vm.prank(WALLET);
        registry.requestUnbond(1_501);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.ZeroAmount.selector));
        vm.prank(WALLET);
        registry.requestUnbond(0);
        vm.prank(WALLET);
        registry.requestUnbond(1_500);
        checkStake(0, 1_500, block.timestamp + UNBOND_DELAY);
    }

    function test_slashTakesActiveThenUnbondingBurnsAndRewards() external {
        stake(WALLET, 3_000);
        vm.prank(WALLET);
        registry.requestUnbond(2_000);
        uint256 releaseAt = block.timestamp + UNBOND_DELAY;
        vm.expectEmit();
        emit IRegistry.Slashed(WALLET, FAULT, REPORTER, 1_500, 150);
        vm.prank(COURT);
        eq(registry.slash(WALLET, 1_500, FAULT, REPORTER), 1_500, "taken");
        checkStake(0, 1_500, releaseAt);
        eq(token.totalSupply(), SUPPLY - 1_350, "burned");
        eq(registry.bountyOf(REPORTER), 150, "bounty");
        isTrue(registry.faultPunished(FAULT), "punished");
        vm.prank(OTHER);
        eq(registry.collectBounty(REPORTER), 150, "collected");
        eq(registry.collectBounty(REPORTER), 0, "collected again");
        eq(token.balanceOf(REPORTER), 150, "reporter's balance");
    }

    function test_I5_slashIsTheCourtsOncePerFaultAndAtMostTheStake() external {
        stake(WALLET, 3_000);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.NotCourt.selector, address(this), COURT));
        registry.slash(WALLET, 1, FAULT, REPORTER);
        vm.prank(COURT);
        eq(registry.slash(WALLET, type(uint256).max, FAULT, REPORTER), 3_000, "taken");
        vm.expectRevert(abi.encodeWithSelector(IRegistry.FaultAlreadyPunished.selector, FAULT));
        vm.prank(COURT);
        registry.slash(WALLET, 1, FAULT, REPORTER);
    }

    function test_withNoReporterAllIsBurned() external {
        stake(WALLET, 3_000);
        vm.prank(COURT);
        registry.slash(WALLET, 1_000, FAULT, address(0));
        eq(token.totalSupply(), SUPPLY - 1_000, "burned");
        eq(registry.bountyOf(address(0)), 0, "bounty");
    }

    function test_profileIsAnnounced() external {
        vm.expectEmit();
        emit IRegistry.ProfileRegistered(PROFILE, address(this), keccak256("file"));
        registry.registerProfile(PROFILE, keccak256("file"));
    }

    function test_logTariffStoresItsWindowUnderItsDigest() external {
        register(WALLET, KEY);
        Tariff memory tariff = tariffOf(1);
        bytes32 hash = tariffDigest(tariff);
        bytes memory sig = signature(KEY, hash);
        vm.expectEmit();
        emit IRegistry.TariffLogged(WALLET, PROFILE, hash, 1, tariff.validFrom, tariff.validUntil);
        vm.prank(OTHER);
        eq(registry.logTariff(tariff, sig), hash, "hash");
        (address provider, uint48 validFrom, uint48 validUntil) = registry.tariffs(hash);
        eq(provider, WALLET, "provider");
        eq(validFrom, tariff.validFrom, "validFrom");
        eq(validUntil, tariff.validUntil, "validUntil");
        eq(registry.lastSequence(WALLET, PROFILE), 1, "lastSequence");
        eq(registry.tariffAt(WALLET, PROFILE, 1), hash, "tariffAt");
    }

    function test_tariffSequenceRises() external {
        register(WALLET, KEY);
        logTariff(tariffOf(2));
        refuseTariff(tariffOf(2), abi.encodeWithSelector(IRegistry.SequenceNotAbove.selector, 2, 2));
        refuseTariff(tariffOf(1), abi.encodeWithSelector(IRegistry.SequenceNotAbove.selector, 1, 2));
        logTariff(tariffOf(3));
        Tariff memory other = tariffOf(1);
        other.profileId = keccak256("another profile");
        logTariff(other);
    }

    function test_tariffStartsAFullEpochAfterLogging() external {
        register(WALLET, KEY);
        Tariff memory tariff = tariffOf(1);
        tariff.validFrom -= 1;
        uint256 earliest = block.timestamp + EPOCH;
        refuseTariff(tariff, abi.encodeWithSelector(IRegistry.TariffTooSoon.selector, earliest - 1, earliest));
        tariff.validFrom += 1;
        tariff.validUntil = tariff.validFrom;
        refuseTariff(
            tariff, abi.encodeWithSelector(IRegistry.TariffWindow.selector, tariff.validFrom, tariff.validUntil)
        );
        tariff.validUntil = uint64(1) << 48;
        refuseTariff(
            tariff, abi.encodeWithSelector(IRegistry.TariffWindow.selector, tariff.validFrom, tariff.validUntil)
        );
    }

    function test_tariffIsSignedByTheCurrentNodeKey() external {
        refuseTariff(tariffOf(1), abi.encodeWithSelector(IRegistry.NotRegistered.selector, WALLET));
        register(WALLET, KEY);
        bytes memory sig = keyConsent(NEXT_KEY, WALLET, 100);
        vm.prank(WALLET);
        registry.rotateNodeKey(vm.addr(NEXT_KEY), 100, sig);
        refuseTariff(tariffOf(1), abi.encodeWithSelector(IRegistry.BadSignature.selector, vm.addr(NEXT_KEY), nodeKey));
    }

    function test_unbondingOutlastsJudgement() external {
        vm.expectRevert(abi.encodeWithSelector(IRegistry.UnbondDelayTooShort.selector, 5 days, 5 days));
        deploy(5 days, EPOCH);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.UnbondDelayTooLong.selector, 365 days + 1, 365 days));
        deploy(365 days + 1, EPOCH);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.ZeroEpoch.selector));
        deploy(5 days + 1, 0);
    }

    function tariffOf(uint64 sequence) private view returns (Tariff memory tariff) {
        tariff.provider = WALLET;
        tariff.sequence = sequence;
        tariff.profileId = PROFILE;
        tariff.promptPrice = 3;
        tariff.validFrom = uint64(block.timestamp + EPOCH);
        tariff.validUntil = tariff.validFrom + 1 days;
    }

    function logTariff(Tariff memory tariff) private {
        bytes memory sig = signature(KEY, tariffDigest(tariff));
        registry.logTariff(tariff, sig);
    }

    function refuseTariff(Tariff memory tariff, bytes memory revertData) private {
        bytes memory sig = signature(KEY, tariffDigest(tariff));
        vm.expectRevert(revertData);
        registry.logTariff(tariff, sig);
    }

    function checkStake(uint256 active, uint256 unbonding, uint256 releaseAt) private view {
        (uint96 gotActive, uint96 gotUnbonding, uint40 gotReleaseAt) = registry.stakeOf(WALLET);
        eq(gotActive, active, "active");
        eq(gotUnbonding, unbonding, "unbonding");
        eq(gotReleaseAt, releaseAt, "releaseAt");
    }
}
