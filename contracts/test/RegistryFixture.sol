// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ITallyToken} from "../src/ITallyToken.sol";
import {Registry} from "../src/Registry.sol";
import {TallyToken} from "../src/TallyToken.sol";
import {NodeKeyConsent, Tariff, Types} from "../src/Types.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice A token and a registry, and the documents that move them.
abstract contract RegistryFixture is Checks {
    uint256 internal constant SUPPLY = 1_000_000 ether;
    uint256 internal constant MIN_STAKE = 1_000;
    uint256 internal constant UNBOND_DELAY = 7 days;
    uint256 internal constant EPOCH = 1 hours;
    address internal constant COURT = address(0xC0047);
    address internal constant ESCROW = address(0xE5C);

    TallyToken internal token = new TallyToken(address(this), address(this), SUPPLY);
    Registry internal registry = deploy(UNBOND_DELAY, EPOCH);

    function deploy(uint256 unbondDelay, uint256 epochSeconds) internal returns (Registry) {
        ITallyToken money = ITallyToken(address(token));
        return new Registry(money, ESCROW, COURT, MIN_STAKE, unbondDelay, epochSeconds, 2 days, 2 days, 1 days);
    }

    function keyConsent(uint256 secret, address wallet, uint64 deadline) internal view returns (bytes memory) {
        bytes32 structHash = Types.hashNodeKeyConsent(NodeKeyConsent(wallet, deadline));
        return signature(secret, Types.digest(registry.domainSeparator(), structHash));
    }

    function register(address wallet, uint256 secret) internal {
        bytes memory sig = keyConsent(secret, wallet, type(uint64).max);
        vm.prank(wallet);
        registry.register(vm.addr(secret), type(uint64).max, sig);
    }

    function stake(address wallet, uint256 amount) internal {
        require(token.transfer(wallet, amount));
        vm.prank(wallet);
        token.approve(address(registry), amount);
        vm.prank(wallet);
        registry.stake(amount);
    }

    function tariffDigest(Tariff memory tariff) internal view returns (bytes32) {
        return Types.digest(registry.domainSeparator(), Types.hashTariff(tariff));
    }
}
