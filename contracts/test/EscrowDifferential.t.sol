// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IEscrow} from "../src/IEscrow.sol";
import {EscrowFixture} from "./EscrowFixture.sol";
import {EscrowReference} from "./EscrowReference.sol";
import {Vm, vm} from "./Vm.sol";

/// @notice Escrow.settle against the plain reference, on batches that mix every kind of item.
contract EscrowDifferentialTest is EscrowFixture {
    uint256 private constant SIGNERS = 4;
    uint256 private constant KINDS = 9;
    uint256 private constant ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;
    address private constant OWNER = address(0xA11CE);
    address private constant PROVIDER = address(0xB0B);

    EscrowReference private plain = new EscrowReference(escrow.domainSeparator());

    function setUp() public {
        for (uint256 secret = 1; secret <= SIGNERS; secret++) {
            openChannel(OWNER, PROVIDER, secret, 1_000 * secret);
            plain.setChannel(PROVIDER, vm.addr(secret), escrow.channel(PROVIDER, vm.addr(secret)));
        }
    }

    /// forge-config: default.fuzz.runs = 512
    function testFuzz_settleIsTheReference(uint256[24] calldata seeds, uint8 size, uint8 cut) external {
        uint256 count = bound(size, 0, seeds.length);
        uint256 first = bound(cut, 0, count);
        settleBoth(seeds, 0, first);
        settleBoth(seeds, first, count);
        settleBoth(seeds, 0, count);
    }

    /// @dev Any bytes at all: garbage signs for nobody that has a channel, and nothing but a bad length reverts.
    function testFuzz_settleOfGarbage(bytes calldata garbage) external {
        bytes memory items = garbage[:garbage.length - garbage.length % 76];
        eq(escrow.settle(PROVIDER, items), 0, "paid");
    }

    function settleBoth(uint256[24] calldata seeds, uint256 from, uint256 to) private {
        EscrowReference.Item[] memory items = new EscrowReference.Item[](to - from);
        bytes memory batch;
        for (uint256 i = from; i < to; i++) {
            items[i - from] = item(seeds[i]);
            batch = bytes.concat(
                batch, abi.encodePacked(items[i - from].r, items[i - from].vs, items[i - from].cumulative)
            );
        }
        (uint256 paid, uint256 fee, uint256[] memory claims) = plain.settle(PROVIDER, items);
        vm.recordLogs();
        eq(escrow.settle(PROVIDER, batch), paid, "paid");
        checkEvent(vm.getRecordedLogs(), paid, fee, claims);
        checkState();
    }

    function checkEvent(Vm.Log[] memory logs, uint256 paid, uint256 fee, uint256[] memory claims) private pure {
        eq(logs.length, paid == 0 ? 0 : 1, "one event when something was paid");
        if (paid == 0) return;
        eq(logs[0].topics[0], IEscrow.Settled.selector, "event");
        eq(logs[0].topics[1], bytes32(uint256(uint160(PROVIDER))), "provider");
        eq(keccak256(logs[0].data), keccak256(abi.encode(paid, fee, claims)), "event data");
    }

    function checkState() private view {
        for (uint256 secret = 1; secret <= SIGNERS; secret++) {
            IEscrow.Channel memory ours = escrow.channel(PROVIDER, vm.addr(secret));
            IEscrow.Channel memory theirs = plain.channel(PROVIDER, vm.addr(secret));
            eq(keccak256(abi.encode(ours)), keccak256(abi.encode(theirs)), "channel");
        }
        (uint256 earned,) = escrow.earnedOf(PROVIDER);
        (uint256 fees,) = escrow.fees();
        eq(earned, plain.earned(PROVIDER), "earned");
        eq(fees, plain.fees(), "fees");
    }

    /// @dev Two kinds are good, one above the deposit; the rest are each bad in one way.
    function item(uint256 seed) private view returns (EscrowReference.Item memory out) {
        uint256 kind = seed % KINDS;
        uint256 secret = 1 + (seed >> 8) % SIGNERS;
        out.cumulative = uint96((seed >> 32) % (1_500 * secret));
        bytes32 digest = voucherDigest(PROVIDER, out.cumulative);
        if (kind == 2) out.cumulative = type(uint96).max - out.cumulative; // not what was signed
        if (kind == 3) secret += SIGNERS; // a key without a channel
        if (kind == 4) digest = voucherDigest(OWNER, out.cumulative); // for another provider
        if (kind == 5) digest = keccak256(abi.encode(digest)); // another domain
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(secret, digest);
        bool odd = v == 28;
        if (kind == 6) s = bytes32(ORDER - uint256(s)); // the twin's s, its top bit lost in packing
        if (kind == 7) odd = !odd; // recovers somebody else
        if (kind == 8) r = (seed >> 16) & 1 == 0 ? bytes32(0) : bytes32(ORDER); // no point has this r
        out.r = r;
        out.vs = bytes32(uint256(s) & type(uint256).max >> 1 | (odd ? 1 << 255 : 0));
    }
}
