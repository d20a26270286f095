// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Faults: what a provider's own signed documents prove against it, with nobody's word taken.
/// @notice Stateless. The Court asks it and punishes; anybody may ask beforehand, with an eth_call.
///
/// A document is a provider's when the key that signed it is, or ever was, registered for the provider's wallet.
/// What is judged here is what incentives/faults.py judges, in the same integers. Each `faultId` names one offence, so
/// the same proof, or another of the same offence, is punished once. Two receipts of one step mostly break the chain
/// too: all lies about one job are one offence, whichever way they are shown.
///
/// | kind         | proof (ABI encoded, in this order)                                         | share | id over        |
/// |--------------|----------------------------------------------------------------------------|-------|----------------|
/// | TWO_TARIFFS  | Tariff a, bytes sigA, Tariff b, bytes sigB                                 | 50 %  | provider, profile, sequence |
/// | TWO_RECEIPTS | WorkReceipt a, bytes sigA, WorkReceipt b, bytes sigB                       | 50 %  | share, provider, job |
/// | PRICE        | Tariff, WorkReceipt, bytes sig                                             | 10 %  | share, provider, job |
/// | BROKEN_CHAIN | WorkReceipt earlier, bytes sig, WorkReceipt later, bytes sig               | 50 %  | share, provider, job |
/// | MISSING      | Tariff, WorkReceipt, bytes sig, Leaf[] neighbours                          | 50 %  | share, provider, job |
/// | UNSORTED     | bytes32 key, Leaf left, Leaf right                                         | 50 %  | key            |
/// | UNCOMMITTED  | Tariff, WorkReceipt, bytes sig                                             | 10 %  | key            |
///
/// - TWO_TARIFFS: two sheets under one sequence number of one profile.
/// - TWO_RECEIPTS: two receipts of one step of one job.
/// - PRICE: a receipt is not what the tariff it names gives: over, under, other lines, not in force when the job was
///   received, a tier not offered, a base multiplier out of bounds, counts that cannot be. The tariff must be logged.
/// - BROKEN_CHAIN: a receipt does not name the one of the step before as its previous; or comes after a final one; or
///   counts less than an earlier one, or charges less without a refund, at the same multiplier.
/// - MISSING: a job of which the provider signed a receipt, interim or final, is absent from its commitment: no entry
///   stands between the neighbours (none: the tree is empty; one: the first or last entry lies beyond the job).
/// - UNSORTED: two neighbouring entries of a commitment are not in ascending order of job id.
/// - UNCOMMITTED: the window for the commitment of a job's epoch is over and there is none; only epochs that began
///   after the profile was accepted.
/// The tariff of MISSING and UNCOMMITTED says the profile: the one whose digest the receipt names, logged or not.
interface IFaults {
    /// @notice The proof's documents do not show the fault. `step`: which of its demands failed, in words.
    error NotProven(string step);
    /// @notice No such kind.
    error UnknownKind(uint8 kind);
    /// @notice The document's signer is registered for `wallet`, not for `provider`.
    error NotSignedBy(address provider, address wallet);

    /// @notice Whether the proof holds.
    /// @return accused The provider's wallet.
    /// @return faultId The offence.
    /// @return shareBps Share of its stake that it loses, in basis points.
    /// @return payer Who paid for the job concerned; zero where the fault is of no one job, or has no channel.
    /// @return payerCap Most wei that the payer can get back: the receipt's total.
    function judge(uint8 kind, bytes calldata proof)
        external
        view
        returns (address accused, bytes32 faultId, uint16 shareBps, address payer, uint96 payerCap);
}
