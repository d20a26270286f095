// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IRegistry} from "../src/IRegistry.sol";
import {Registry} from "../src/Registry.sol";
import {TallyToken} from "../src/TallyToken.sol";
import {RegistryFixture} from "./RegistryFixture.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice Three stakers and a court that slashes at will, in any order forge likes.
/// @dev Every action is valid for the state it meets (fail_on_revert), or does nothing.
contract RegistryHandler is Checks {
    uint256 public constant WALLETS = 3;
    uint256 private constant FAULTS = 20;

    Registry private immutable _registry;
    TallyToken private immutable _token;
    address private immutable _court;

    /// @notice Totals over everything that happened.
    uint256 public staked;
    uint256 public withdrawn;
    uint256 public taken;
    uint256 public donated;

    constructor(Registry registry, TallyToken token, address court) {
        _registry = registry;
        _token = token;
        _court = court;
        for (uint256 i = 0; i < WALLETS; i++) {
            vm.prank(wallet(i));
            token.approve(address(registry), type(uint256).max);
        }
    }

    function wallet(uint256 i) public pure returns (address) {
        return address(uint160(0xA11CE00 + i % WALLETS));
    }

    function stake(uint256 w, uint256 amount) external {
        (uint256 active,,) = _registry.stakeOf(wallet(w));
        amount = bound(amount, 0, _token.balanceOf(wallet(w)));
        if (amount == 0 || active + amount < _registry.minStake()) return;
        vm.prank(wallet(w));
        _registry.stake(amount);
        staked += amount;
    }

    function requestUnbond(uint256 w, uint256 amount) external {
        (uint256 active,,) = _registry.stakeOf(wallet(w));
        amount = bound(amount, 0, active);
        if (amount == 0) return;
        if (active - amount < _registry.minStake()) amount = active;
        vm.prank(wallet(w));
        _registry.requestUnbond(amount);
    }

    function withdraw(uint256 w) external {
        (, uint256 unbonding, uint256 releaseAt) = _registry.stakeOf(wallet(w));
        if (unbonding == 0) return;
        if (block.timestamp < releaseAt) vm.warp(releaseAt);
        vm.prank(wallet(w));
        withdrawn += _registry.withdraw();
    }

    /// @dev I5: a punished fault is refused; a new one takes min(amount, stake), unbonding stake included.
    function slash(uint256 w, uint256 amount, uint256 fault, uint256 reporter) external {
        bytes32 faultId = bytes32(fault % FAULTS);
        (uint256 active, uint256 unbonding,) = _registry.stakeOf(wallet(w));
        if (_registry.faultPunished(faultId)) {
            vm.expectRevert(abi.encodeWithSelector(IRegistry.FaultAlreadyPunished.selector, faultId));
            vm.prank(_court);
            _registry.slash(wallet(w), amount, faultId, wallet(reporter));
            return;
        }
        amount = bound(amount, 0, 2 * (active + unbonding));
        vm.prank(_court);
        uint256 took = _registry.slash(wallet(w), amount, faultId, wallet(reporter));
        eq(took, amount < active + unbonding ? amount : active + unbonding, "I5: slash <= stake");
        (uint256 activeAfter, uint256 unbondingAfter,) = _registry.stakeOf(wallet(w));
        eq(activeAfter + unbondingAfter, active + unbonding - took, "I5: taken from the stake");
        taken += took;
    }

    function collectBounty(uint256 w) external {
        _registry.collectBounty(wallet(w));
    }

    function donate(uint256 w, uint256 amount) external {
        amount = bound(amount, 0, _token.balanceOf(wallet(w)) / 10);
        vm.prank(wallet(w));
        require(_token.transfer(address(_registry), amount));
        donated += amount;
    }
}

/// @notice I4 and I5, after any sequence of the handler's actions.
contract RegistryInvariantsTest is RegistryFixture {
    RegistryHandler private handler;

    function setUp() public {
        handler = new RegistryHandler(registry, token, COURT);
        for (uint256 i = 0; i < handler.WALLETS(); i++) {
            require(token.transfer(handler.wallet(i), 100_000));
        }
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        bytes4[] memory selectors = new bytes4[](6);
        selectors[0] = RegistryHandler.stake.selector;
        selectors[1] = RegistryHandler.requestUnbond.selector;
        selectors[2] = RegistryHandler.withdraw.selector;
        selectors[3] = RegistryHandler.slash.selector;
        selectors[4] = RegistryHandler.collectBounty.selector;
        selectors[5] = RegistryHandler.donate.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), selectors);
    }

    /// @notice I4: balance >= active + unbonding + bounties; here exactly, donations aside.
    function invariant_I4_stakeIsHeld() external view {
        uint256 owed = 0;
        for (uint256 i = 0; i < handler.WALLETS(); i++) {
            (uint256 active, uint256 unbonding,) = registry.stakeOf(handler.wallet(i));
            owed += active + unbonding + registry.bountyOf(handler.wallet(i));
        }
        eq(token.balanceOf(address(registry)), owed + handler.donated(), "I4: balance");
    }

    /// @notice I5: what was slashed and withdrawn in all never passes what was staked in all.
    function invariant_I5_slashIsBoundedByStake() external view {
        uint256 left = 0;
        for (uint256 i = 0; i < handler.WALLETS(); i++) {
            (uint256 active, uint256 unbonding,) = registry.stakeOf(handler.wallet(i));
            left += active + unbonding;
        }
        eq(handler.staked(), left + handler.withdrawn() + handler.taken(), "I5: stake is conserved");
    }
}
