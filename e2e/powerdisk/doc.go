// Package powerdisk is a file system whose power can be cut: a FUSE mount in memory that forgets, at a cut, what was not
// synced. Linux only, as root.
//
// What is durable, after fsync(2), open(2) with O_SYNC or O_DSYNC, and msync(2) with MS_SYNC, which all reach it as one request:
//
//   - Data and size of a file: at the fsync of that file.
//   - Names: at the fsync of their directory, both names of a rename at once. In the mode Journaled also at the fsync of the
//     file: of a file that was just created or renamed, its present name outlives the power cut, and so do the directories above
//     it. ext4, xfs, btrfs and f2fs do at least that; ext4 and xfs make all earlier changes of names durable too, which is
//     not modelled, so nobody can rely on it. In the mode Strict only what POSIX and fsync(2) promise holds.
//   - Modes, owners and times: at once. Nothing here rests on them.
//
// At a cut, whatever is not durable is lost or not, at random:
//
//   - Each write to a file is kept, dropped, or torn at a boundary of 512 bytes or 4 KiB, independently of all others. What
//     memory maps wrote arrives from the kernel as writes, page by page, and is treated alike.
//   - Sizes change in order: those up to a random point are kept. A size that is kept while its data is not gives zeros, as
//     ext4 does at the end of a file. Data behind a truncation that is lost is lost with it.
//   - Changes of names are kept up to a random point of each directory, and lost from there on.
//
// Not modelled: a disk that lies about its flushes, sectors that are damaged by a torn write, other people's blocks in new ones.
package powerdisk
