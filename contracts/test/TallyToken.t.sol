// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {TallyToken} from "../src/TallyToken.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice The cap, the minter and the burn; transfers and permits are OpenZeppelin's.
contract TallyTokenTest is Checks {
    address private constant MINTER = address(0x3117);
    TallyToken private token = new TallyToken(MINTER, address(this), 100);

    function test_initialDistribution() external view {
        eq(token.balanceOf(address(this)), 100, "holder");
        eq(token.totalSupply(), 100, "supply");
        eq(token.minter(), MINTER, "minter");
        eq(token.CAP(), 1_000_000_000 ether, "cap");
    }

    function test_onlyTheMinterMints() external {
        vm.expectRevert(abi.encodeWithSelector(TallyToken.NotMinter.selector, address(this), MINTER));
        token.mint(address(this), 1);
    }

    function testFuzz_supplyNeverPassesTheCap(uint256 amount) external {
        uint256 room = token.CAP() - token.totalSupply();
        amount = bound(amount, room + 1, type(uint256).max - 100);
        vm.expectRevert(abi.encodeWithSelector(TallyToken.CapExceeded.selector, amount + 100, token.CAP()));
        vm.prank(MINTER);
        token.mint(address(this), amount);
        vm.prank(MINTER);
        token.mint(address(this), room);
        eq(token.totalSupply(), token.CAP(), "at the cap");
    }

    function test_constructionIsBoundedByTheCap() external {
        uint256 cap = token.CAP();
        vm.expectRevert(abi.encodeWithSelector(TallyToken.CapExceeded.selector, cap + 1, cap));
        new TallyToken(MINTER, address(this), cap + 1);
    }

    function test_burnLowersTheSupply() external {
        token.burn(40);
        eq(token.totalSupply(), 60, "supply");
        eq(token.balanceOf(address(this)), 60, "holder");
    }
}
