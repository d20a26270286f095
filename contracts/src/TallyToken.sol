// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Burnable} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Burnable.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";

/// @title TALLY: what inference is paid in and stake is held in.
/// @notice ERC-20 with permit (ERC-2612) and burn; supply never above `CAP`.
/// @dev Assumes nothing of its holders. Calls nobody: there are no hooks, so a transfer cannot re-enter.
contract TallyToken is ERC20, ERC20Burnable, ERC20Permit {
    /// @notice Most TALLY that can exist at once, in wei: 1e9 TALLY, which fits the Escrow's uint96 56 times over.
    uint256 public constant CAP = 1_000_000_000 ether;

    /// @notice The only address that may mint; fixed for ever, so no key can be handed this power later.
    address public immutable minter;

    /// @notice `caller` is not the minter.
    error NotMinter(address caller, address minter);

    /// @notice The supply would be `supply`, above `cap`.
    error CapExceeded(uint256 supply, uint256 cap);

    /// @param minter_ Who may mint from now on; the zero address means nobody ever.
    /// @param holder Receives the initial distribution.
    /// @param amount Initial distribution in wei, at most CAP.
    constructor(address minter_, address holder, uint256 amount)
        ERC20("Tallystick", "TALLY")
        ERC20Permit("Tallystick")
    {
        minter = minter_;
        _mintWithinCap(holder, amount);
    }

    /// @notice Create `amount` wei for `to`. Only the minter.
    function mint(address to, uint256 amount) external {
        if (msg.sender != minter) revert NotMinter(msg.sender, minter);
        _mintWithinCap(to, amount);
    }

    function _mintWithinCap(address to, uint256 amount) private {
        uint256 supply = totalSupply() + amount;
        if (supply > CAP) revert CapExceeded(supply, CAP);
        _mint(to, amount);
    }
}
