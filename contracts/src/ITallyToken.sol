// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";

/// @notice What Escrow and Registry need of the token.
/// @dev Assumed: transfers move exactly `value` or revert, balances change by transfers alone, no hooks.
interface ITallyToken is IERC20, IERC20Permit {
    /// @notice Destroy `value` wei of the caller's.
    function burn(uint256 value) external;
}
