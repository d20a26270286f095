// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Escrow} from "../src/Escrow.sol";
import {ITallyToken} from "../src/ITallyToken.sol";
import {SessionConsent, Types, Voucher} from "../src/Types.sol";
import {TallyToken} from "../src/TallyToken.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice A token and an escrow, and the documents that move them.
abstract contract EscrowFixture is Checks {
    uint256 internal constant EXIT_DELAY = 1 hours;
    uint256 internal constant SUPPLY = 1_000_000 ether;

    TallyToken internal token = new TallyToken(address(this), address(this), SUPPLY);
    Escrow internal escrow = new Escrow(ITallyToken(address(token)), EXIT_DELAY);

    function voucherDigest(address provider, uint96 cumulative) internal view returns (bytes32) {
        return Types.digest(escrow.domainSeparator(), Types.hashVoucher(Voucher(provider, cumulative)));
    }

    function voucher(uint256 secret, address provider, uint96 cumulative) internal view returns (bytes memory) {
        return packedVoucher(secret, voucherDigest(provider, cumulative), cumulative);
    }

    function consent(uint256 secret, address owner, address provider, uint64 deadline)
        internal
        view
        returns (bytes memory)
    {
        bytes32 structHash = Types.hashSessionConsent(SessionConsent(owner, provider, deadline));
        return signature(secret, Types.digest(escrow.domainSeparator(), structHash));
    }

    /// @dev Give `owner` the money and open the channel of `secret`'s session key.
    function openChannel(address owner, address provider, uint256 secret, uint256 amount) internal {
        require(token.transfer(owner, amount));
        vm.prank(owner);
        token.approve(address(escrow), amount);
        bytes memory sig = consent(secret, owner, provider, type(uint64).max);
        vm.prank(owner);
        escrow.open(provider, vm.addr(secret), amount, type(uint64).max, sig);
    }

    function claimedOf(address provider, uint256 secret) internal view returns (uint256) {
        return escrow.channel(provider, vm.addr(secret)).claimed;
    }
}
