# assemble.sh TAR TREE IMAGE EPOCH UUID: makes the OS image from a bootstrap.
# Runs as mapped root in a user and mount namespace of its own.
set -eu
tar=$1 tree=$2 image=$3 epoch=$4 uuid=$5

mkdir "$tree"
tar -x -f "$tar" -C "$tree" --numeric-owner --exclude='./dev/*'
cd "$tree"

# Nothing of the build, of this machine or of an instance.
rm -rf var/cache/* var/lib/apt/* var/log/* var/tmp/* tmp/* run/* boot/* root/.??* \
  usr/share/doc/* usr/share/man/* usr/share/info/* usr/share/locale/* usr/share/lintian usr/share/bash-completion usr/share/zsh \
  etc/hostname etc/resolv.conf etc/ssh etc/passwd- etc/shadow- etc/group- etc/gshadow- etc/.pwd.lock etc/subuid- etc/subgid- \
  var/lib/systemd/random-seed var/lib/dbus var/lib/dpkg/*-old var/lib/dpkg/lock* var/backups
: >etc/machine-id
: >etc/resolv.conf
echo localhost >etc/hostname
printf '127.0.0.1 localhost\n' >etc/hosts
: >etc/fstab

# /var is the VM's volume, empty on its first start: the package list is part of the
# OS, so it lies in /usr.
mkdir -p usr/lib/sysimage
mv var/lib/dpkg usr/lib/sysimage/dpkg
cat >usr/lib/tmpfiles.d/foothold.conf <<'END'
L+ /var/lib/dpkg - - - - ../../usr/lib/sysimage/dpkg
END
rm -rf var/*
chmod 0755 root home srv 2>/dev/null || true
chmod 0700 root
mkdir -p home srv mnt media

# Nobody logs in: no shell, no password, no console, no privilege to gain.
sed -i -e 's/^\([^:]*\):[^:]*:/\1:*:/' etc/shadow
sed -i -e 's#:/bin/\(bash\|sync\|sh\)$#:/usr/sbin/nologin#' etc/passwd
find . -xdev -type f -perm /6000 -exec chmod ug-s {} +

# One target, and only what it needs. The agent has set up disks, mounts, network and
# entropy before systemd starts; nothing may be asked for or installed at run time.
unit=etc/systemd/system
rm -rf $unit/*.wants $unit/*.requires
mask() { for name; do ln -sf /dev/null "$unit/$name"; done; }
ln -sf /lib/systemd/system/multi-user.target $unit/default.target
mask getty.target getty-static.service getty@.service serial-getty@.service console-getty.service container-getty@.service \
  autovt@.service debug-shell.service emergency.service rescue.service systemd-logind.service systemd-user-sessions.service \
  user@.service user-runtime-dir@.service \
  systemd-networkd.service systemd-networkd.socket systemd-networkd-wait-online.service systemd-resolved.service \
  systemd-timesyncd.service systemd-firstboot.service systemd-machine-id-commit.service systemd-random-seed.service \
  systemd-repart.service systemd-growfs@.service systemd-sysusers.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
  proc-sys-fs-binfmt_misc.mount systemd-modules-load.service modprobe@.service kmod-static-nodes.service \
  systemd-remount-fs.service systemd-fsck-root.service systemd-pstore.service systemd-boot-system-token.service \
  systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-pcrphase-initrd.service systemd-pcrmachine.service systemd-pcrfs-root.service \
  systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-update-done.service systemd-hwdb-update.service ldconfig.service \
  systemd-journal-catalog-update.service systemd-journal-flush.service systemd-initctl.service systemd-initctl.socket systemd-hibernate.service systemd-suspend.service \
  systemd-hybrid-sleep.service systemd-suspend-then-hibernate.service systemd-coredump.socket systemd-coredump@.service \
  systemd-journald-audit.socket systemd-ask-password-console.path systemd-ask-password-wall.path systemd-ask-password-plymouth.path \
  systemd-tmpfiles-setup-dev.service systemd-tmpfiles-clean.timer \
  cryptsetup.target integritysetup.target veritysetup.target remote-fs.target remote-cryptsetup.target remote-veritysetup.target \
  dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount sys-fs-fuse-connections.mount \
  apt-daily.timer apt-daily.service apt-daily-upgrade.timer apt-daily-upgrade.service dpkg-db-backup.timer dpkg-db-backup.service \
  e2scrub_all.timer e2scrub_all.service e2scrub_reap.service fstrim.timer fstrim.service motd-news.timer \
  ctrl-alt-del.target swap.target systemd-quotacheck.service quotaon.service
# Generators make units of fstab, the command line, disks and System V scripts; each
# is a program to run at every start, and none has anything to say here.
mkdir -p etc/systemd/system-generators etc/systemd/journald.conf.d etc/systemd/system.conf.d
for generator in usr/lib/systemd/system-generators/*; do ln -s /dev/null "etc/systemd/system-generators/${generator##*/}"; done
rm -rf etc/rc?.d/* etc/init.d/*
cat >etc/systemd/journald.conf.d/foothold.conf <<'END'
[Journal]
Storage=volatile
RuntimeMaxUse=16M
Audit=no
ReadKMsg=no
END
cat >etc/systemd/system.conf.d/foothold.conf <<'END'
[Manager]
CtrlAltDelBurstAction=none
DumpCore=no
CrashShell=no
ShowStatus=no
DefaultLimitCORE=0
END

mkfs.erofs --quiet -zlz4hc,9 -C16384 -x-1 -T"$epoch" -U "$uuid" "$image" .
