// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ITallyToken} from "../src/ITallyToken.sol";
import {Reservations} from "../src/Reservations.sol";
import {TallyToken} from "../src/TallyToken.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice A token, and rights to compute sold in it.
abstract contract ReservationsFixture is Checks {
    uint256 internal constant PERIOD = 1 hours;
    uint256 internal constant SUPPLY = 1_000_000 ether;
    bytes32 internal constant PROFILE = keccak256("profile");

    TallyToken internal token = new TallyToken(address(this), address(this), SUPPLY);
    Reservations internal reservations = new Reservations(ITallyToken(address(token)), PERIOD);

    function fund(address buyer, uint256 amount) internal {
        require(token.transfer(buyer, amount));
        vm.prank(buyer);
        token.approve(address(reservations), type(uint256).max);
    }

    function period() internal view returns (uint40) {
        return uint40(block.timestamp / PERIOD);
    }
}
