// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {IEscrow} from "../src/IEscrow.sol";
import {Types, Voucher} from "../src/Types.sol";

/// @notice What Escrow.settle means, in plain Solidity and without regard for gas. Deployed by tests only.
contract EscrowReference {
    /// @notice One voucher before packing.
    struct Item {
        bytes32 r;
        bytes32 vs;
        uint96 cumulative;
    }

    bytes32 private immutable _separator;

    mapping(address provider => mapping(address signer => IEscrow.Channel)) private _channels;
    mapping(address provider => uint256) public earned;
    uint256 public fees;

    constructor(bytes32 separator) {
        _separator = separator;
    }

    function setChannel(address provider, address signer, IEscrow.Channel calldata state) external {
        _channels[provider][signer] = state;
    }

    function channel(address provider, address signer) external view returns (IEscrow.Channel memory) {
        return _channels[provider][signer];
    }

    /// @notice Same as Escrow.settle, the event's fields returned instead of emitted.
    function settle(address provider, Item[] calldata items)
        external
        returns (uint256 paid, uint256 fee, uint256[] memory claims)
    {
        uint256[] memory found = new uint256[](items.length);
        uint256 count = 0;
        for (uint256 i = 0; i < items.length; i++) {
            address signer = _signerOf(provider, items[i]);
            if (signer == address(0)) continue;
            IEscrow.Channel storage state = _channels[provider][signer];
            uint96 payable_ = items[i].cumulative < state.deposit ? items[i].cumulative : state.deposit;
            if (payable_ <= state.claimed) continue;
            paid += payable_ - state.claimed;
            state.claimed = payable_;
            found[count++] = uint256(uint160(signer)) << 96 | payable_;
        }
        fee = paid * 1_200 / 10_000;
        earned[provider] += paid - fee;
        fees += fee;
        claims = new uint256[](count);
        for (uint256 i = 0; i < count; i++) {
            claims[i] = found[i];
        }
    }

    /// @dev Zero when nobody, or a malleable signature, signed.
    function _signerOf(address provider, Item calldata item) private view returns (address signer) {
        bytes32 digest = Types.digest(_separator, Types.hashVoucher(Voucher(provider, item.cumulative)));
        (signer,,) = ECDSA.tryRecover(digest, item.r, item.vs);
    }
}
